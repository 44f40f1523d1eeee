"""Unit tests of finished models and of run checkpoints on disk."""

import dataclasses
import errno
import fcntl
import gc
import json
import os
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checks import disk, process, tiny

from mil_jax.checkpoint import models, orbax_io
from mil_jax.checkpoint.orbax_io import RunCheckpoints, load_model, save_model
from mil_jax.config import ModelConfig, RopeScaling
from mil_jax.errors import UserError

CONFIG = tiny.CONFIGS["mamba"]


def _params(dtype):
    """Weights in `dtype`, those of the recurrence in float32, with odd bit patterns."""
    params = {}
    for name, value in tiny.params("mamba").items():
        narrow = not name.endswith((".A_log", ".D", ".dt_bias"))
        params[name] = value.astype(dtype if narrow else np.float32)
    scale = params["final_norm.scale"]
    scale[:4] = np.array([-0.0, np.inf, 1e-40, 3.3895e38]).astype(scale.dtype)
    return params


def _assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        got, value = found[name], np.asarray(value)
        assert isinstance(got, np.ndarray), name
        assert got.dtype == value.dtype and got.shape == value.shape, name
        np.testing.assert_array_equal(
            np.ascontiguousarray(got).view(np.uint8),
            np.ascontiguousarray(value).view(np.uint8),
            err_msg=name,
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    save_model(
        path, CONFIG, tiny.params("mamba"), assets_from=models.resolve("demo_teacher")
    )
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


class TestModels:
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("on_device", [False, True])
    def test_round_trip_keeps_every_bit(self, tmp_path, dtype, on_device):
        params = _params(dtype)
        given = dict(params)
        if on_device:
            # A split weight and a replicated one.
            mesh = jax.make_mesh((8,), ("x",))
            split = jax.NamedSharding(mesh, jax.P("x"))
            given = {name: jnp.asarray(value) for name, value in params.items()}
            name = "layers.0.mamba.out_proj.kernel"
            given[name] = jax.device_put(given[name], split)
        save_model(tmp_path / "model", CONFIG, given)
        config, found = load_model(tmp_path / "model")
        assert config == CONFIG
        _assert_same_bits(found, params)

    def test_every_field_of_the_config_survives(self, tmp_path):
        config = dataclasses.replace(
            tiny.CONFIGS["attention"],
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
            sliding_window=7,
            eos_token_ids=(3, 4),
            bos_token_id=1,
            pad_token_id=0,
            model_type="mistral",
        )
        save_model(tmp_path / "m", config, {"final_norm.scale": np.ones(3)})
        assert load_model(tmp_path / "m")[0] == config

    def test_names_on_disk_are_per_layer(self, saved):
        metadata = json.loads((saved / "weights" / "_METADATA").read_text())
        names = {
            entry["key_metadata"][0]["key"]
            for entry in metadata["tree_metadata"].values()
        }
        assert names == set(tiny.params("mamba"))
        assert "layers.0.mamba.x_proj.kernel" in names
        assert "layers.1.attn.q_proj.kernel" in names

    def test_config_on_disk_is_plain_json(self, saved):
        values = json.loads((saved / "model_config.json").read_text())
        assert values["layer_types"] == ["mamba", "attention"]
        assert values["ssm"]["d_state"] == 8
        assert set(values) == {f.name for f in dataclasses.fields(ModelConfig)}

    def test_tokenizer_is_copied(self, saved):
        source = models.resolve("demo_teacher")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (saved / name).read_bytes() == (source / name).read_bytes()
        assert not (saved / "model.safetensors").exists()
        assert not (saved / "config.json").exists()

    def test_models_load_tells_the_formats_apart(self, saved):
        found = models.load(saved)
        assert found.config == CONFIG and found.source == saved
        _assert_same_bits(found.params, tiny.params("mamba"))
        assert models.load("demo_teacher").config.n_layers == 8

    def test_nothing_is_overwritten(self, copy):
        before = sorted(p.name for p in copy.parent.iterdir())
        with pytest.raises(UserError, match="exists; nothing is overwritten"):
            save_model(copy, CONFIG, {})
        _assert_same_bits(load_model(copy)[1], tiny.params("mamba"))
        assert sorted(p.name for p in copy.parent.iterdir()) == before

    @pytest.mark.parametrize(
        "where", ["copy_tokenizer", "model_config_to_dict", "os.replace"]
    )
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_failed_save_leaves_nothing(self, tmp_path, monkeypatch, where, error):
        def fail(*args):
            raise error

        target = f"mil_jax.checkpoint.orbax_io.{where}"
        params = {"final_norm.scale": np.ones(3)}
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(type(error)):
                save_model(tmp_path / "model", CONFIG, params)
        assert list(tmp_path.iterdir()) == []
        save_model(tmp_path / "model", CONFIG, params)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def test_full_disk(self, tmp_path):
        params = {"a": np.random.default_rng(0).normal(size=1_000_000)}
        with disk.limited(1_000_000), pytest.raises(UserError) as error:
            save_model(tmp_path / "model", CONFIG, params)
        assert str(error.value) == (
            f"cannot write {tmp_path}/model (File too large); free some space"
        )
        assert list(tmp_path.iterdir()) == []

    def test_what_a_kill_left_is_removed(self, tmp_path):
        left = tmp_path / ".model.partial" / "weights"
        left.mkdir(parents=True)
        (left / "half").write_text("")
        save_model(tmp_path / "model", CONFIG, {"final_norm.scale": np.ones(3)})
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert not (tmp_path / "model" / "weights" / "half").exists()

    def test_only_one_process_writes(self, tmp_path):
        partial = tmp_path / ".model.partial"
        partial.mkdir()
        other = os.open(partial, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        params = {"final_norm.scale": np.ones(3)}
        with pytest.raises(
            UserError, match="another process is writing .*/model; wait"
        ):
            save_model(tmp_path / "model", CONFIG, params)
        assert partial.is_dir()
        os.close(other)
        save_model(tmp_path / "model", CONFIG, params)

    def test_what_is_added_belongs_to_the_folder(self, tmp_path):
        """It lies there before the folder has its name; a failure leaves neither."""
        path = tmp_path / "model"
        params = {"final_norm.scale": np.ones(3)}

        def add(folder):
            assert not path.exists() and (folder / "model_config.json").exists()
            (folder / "more").write_text("1")
            if fails:
                raise KeyboardInterrupt

        for fails in (True, False):
            with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
                save_model(path, CONFIG, params, add=add)
            assert path.exists() is not fails
        assert (path / "more").read_text() == "1"

    def test_every_process_finds_the_whole_folder(self, tmp_path):
        """Two for real; the one that names the folder is slow."""
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        env = process.environment(tmp_path / "compiled")
        program = Path(__file__).with_name("two_processes.py")
        started = [
            process.start([program, tmp_path / "model", port, i], env) for i in range(2)
        ]
        try:
            for one in reversed(started):  # The one that may be too early.
                out, err = one.communicate(timeout=240)
                assert one.returncode == 0, err
                assert out.splitlines()[-1] == "0"
        finally:
            for one in started:
                one.kill()

    def test_folder_that_is_no_model(self, tmp_path):
        assert not orbax_io.is_model_dir(tmp_path)
        with pytest.raises(UserError, match="holds no model_config.json; it is not a"):
            load_model(tmp_path)
        with pytest.raises(UserError, match="no model_config.json"):
            load_model(tmp_path / "missing")

    @pytest.mark.parametrize(
        "text", ["{", "[]", "3", '{"vocab_size": 3, "nope": 1}', '{"vocab_size": "3"}']
    )
    def test_damaged_config(self, copy, text):
        (copy / "model_config.json").write_text(text)
        with pytest.raises(UserError) as error:
            load_model(copy)
        assert "\n" not in str(error.value)
        assert str(copy) in str(error.value)


@pytest.fixture(scope="class")
def drop_unfinished_reads():
    """Orbax leaves those of other arrays behind when one fails."""
    yield
    gc.collect()


@pytest.mark.usefixtures("drop_unfinished_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamagedModels:
    @pytest.mark.parametrize(
        "part",
        ["weights", "weights/_METADATA", "weights/manifest.ocdbt", "weights/d"],
    )
    @pytest.mark.parametrize("how", ["delete", "truncate"])
    def test_damaged_weights(self, copy, part, how):
        path = copy / part
        if how == "truncate":
            for file in [p for p in path.rglob("*") if p.is_file()] or [path]:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        with pytest.raises(UserError) as error:
            load_model(copy)
        message = str(error.value)
        assert str(copy / "weights") in message and "damaged" in message
        assert message.endswith(
            f"copy it again, or delete {copy} and run its stage again"
        )
        assert "NoneType" not in message
        assert "\n" not in message


class TestRunCheckpoints:
    """Damage is in tests/train/test_loop.py, other meshes in tests/train/test_state.py."""

    STATE = {"a": {"b": np.arange(5.0)}, "step": np.int32(3)}

    def _abstract(self):
        place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), self.STATE
        )

    def test_round_trip(self, tmp_path):
        checkpoints = RunCheckpoints(tmp_path)
        assert checkpoints.latest_step() is None
        state = jax.tree.map(jnp.asarray, self.STATE)
        checkpoints.save(3, state, {"step": 3, "note": "ä"})
        checkpoints.close()
        checkpoints = RunCheckpoints(tmp_path)
        assert checkpoints.latest_step() == 3
        found, position = checkpoints.restore(3, self._abstract())
        checkpoints.close()
        assert position == {"step": 3, "note": "ä"}
        assert found["a"]["b"].devices() == {jax.devices()[1]}
        np.testing.assert_array_equal(found["a"]["b"], self.STATE["a"]["b"])
        assert int(found["step"]) == 3

    def test_two_are_kept(self, tmp_path):
        checkpoints = RunCheckpoints(tmp_path)
        state = jax.tree.map(jnp.asarray, self.STATE)
        for step in (2, 5, 9):
            checkpoints.save(step, state, {"step": step})
        checkpoints.close()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]

    def test_full_disk(self, tmp_path):
        """One line, told at the next call; the checkpoints before stay and are used."""
        checkpoints = RunCheckpoints(tmp_path)
        checkpoints.save(3, jax.tree.map(jnp.asarray, self.STATE), {"step": 3})
        checkpoints.close()
        large = {"a": np.random.default_rng(0).normal(size=1_000_000)}
        for told_by in ("save", "close"):
            checkpoints = RunCheckpoints(tmp_path)
            with disk.limited(1_000_000), pytest.raises(UserError) as error:
                checkpoints.save(5, large, {"step": 5})
                if told_by == "save":
                    checkpoints.save(6, large, {"step": 6})
                checkpoints.close()
            assert str(error.value) == (
                f"cannot write {tmp_path} (File too large); free some space, the same "
                "command then goes on after step 3"
            )
            checkpoints.close()
        checkpoints = RunCheckpoints(tmp_path)
        assert checkpoints.latest_step() == 3
        assert checkpoints.restore(3, self._abstract())[1] == {"step": 3}
        checkpoints.close()
        assert [p.name for p in tmp_path.iterdir()] == ["3"]

    @pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.ENOENT])
    def test_unfinished_is_removed_although_still_written(
        self, tmp_path, monkeypatch, number
    ):
        """As by what goes on of a save that failed."""
        (tmp_path / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        rmtree, tried = shutil.rmtree, []

        def written_to(path, *args, **kwargs):
            tried.append(path)
            if len(tried) < 3:
                raise OSError(number, os.strerror(number))
            rmtree(path, *args, **kwargs)

        monkeypatch.setattr(shutil, "rmtree", written_to)
        RunCheckpoints(tmp_path).close()
        assert len(tried) == 3
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EACCES])
    def test_unfinished_that_stays(self, tmp_path, monkeypatch, number):
        """In the way for good, or for longer than is waited."""
        (tmp_path / "6.orbax-checkpoint-tmp").mkdir()

        def stays(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(shutil, "rmtree", stays)
        monkeypatch.setattr(orbax_io, "_PATIENCE", 0.2)
        with pytest.raises(UserError) as error:
            RunCheckpoints(tmp_path)
        assert str(error.value).startswith(
            f"cannot write {tmp_path} ({os.strerror(number)}); "
        )

    def test_unreadable_is_not_damaged(self, tmp_path, monkeypatch):
        """A checkpoint that may be whole: nobody is told to delete it."""
        checkpoints = RunCheckpoints(tmp_path)

        def restore(*args, **kwargs):
            raise ValueError("Error reading") from PermissionError(errno.EACCES, "no")

        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        with pytest.raises(UserError) as error:
            checkpoints.restore(3, self._abstract())
        checkpoints.close()
        assert str(error.value) == (
            f"checkpoint {tmp_path}/3 cannot be read (Permission denied); check the disk "
            "and your rights"
        )

    def test_missing_step(self, tmp_path):
        checkpoints = RunCheckpoints(tmp_path)
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.restore(7, self._abstract())
        checkpoints.close()
