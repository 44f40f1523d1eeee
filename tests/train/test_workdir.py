"""Unit tests of a workdir's claims: which config a stage's folder belongs to, and to whom."""

import dataclasses
import errno
import os

import pytest

from configs import tiny
from mil_jax.config import RunConfig, from_config_dict
from mil_jax.errors import UserError
from mil_jax.train.workdir import CONFIG_FILE, Workdir


def config_of(stage, **changes):
    """Returns the tiny config with dotted keys changed (`__` stands for a dot)."""
    values = tiny.get_config(f"stage={stage}")
    for key, value in changes.items():
        *path, last = key.split("__")
        node = values
        for name in path:
            node = node[name]
        node[last] = value
    return from_config_dict(RunConfig, values.to_dict())


def claim(path, config):
    with Workdir(path) as workdir:
        return workdir.claim(config.stage.name, config)


def claimed(path, stage, **changes):
    """Returns a stage's folder with something in it that would be lost."""
    folder = claim(path, config_of(stage, **changes))
    (folder / "checkpoints").mkdir()
    return folder


READ = {
    "pseudo_labels": {"stage__temperature": 0.5, "data__prompts": "x", "teacher": "x"},
    "distill": {"conversion__mixer": "mamba2", "data__labels": "x", "seed": 7},
    "sft": {"data__conversations": "x", "stage__kl_weight": 1.0, "stage__epochs": 9},
    "dpo": {"data__preferences": "x", "stage__dpo_beta": 0.5, "stage__start_from": "x"},
    "draft": {"stage__draft_layers": (1,), "stage__target": "x", "tokenizer": "x"},
}
NOT_READ = {
    "pseudo_labels": {"conversion__mixer": "mamba2", "stage__optimizer__lr": 0.5},
    "distill": {"data__conversations": "x", "stage__max_new_tokens": 3},
    "sft": {"conversion__mixer": "mamba2", "data__prompts": "x", "stage__top_k": 3},
    "dpo": {"data__conversations": "x", "stage__ce_weight": 0.5, "stage__packed": True},
    "draft": {
        "data__preferences": "x",
        "stage__dpo_beta": 0.5,
        "data__evaluation": "x",
    },
}


def _cases(table):
    return [(stage, {k: v}) for stage, keys in table.items() for k, v in keys.items()]


class TestClaim:
    @pytest.mark.parametrize(("stage", "change"), _cases(READ))
    def test_what_the_stage_reads_binds(self, tmp_path, stage, change):
        folder = claimed(tmp_path, stage)
        before = (folder / CONFIG_FILE).read_text()
        with pytest.raises(UserError) as error:
            claim(tmp_path, config_of(stage, **change))
        key = next(iter(change)).replace("__", ".")
        assert str(error.value).startswith(
            f"{folder} holds work of another config: {key} was "
        )
        assert (folder / CONFIG_FILE).read_text() == before
        assert claim(tmp_path, config_of(stage)) == folder

    @pytest.mark.parametrize(("stage", "change"), _cases(NOT_READ))
    def test_what_it_does_not_read_may_change(self, tmp_path, stage, change):
        assert config_of(stage, **change) != config_of(stage)
        folder = claimed(tmp_path, stage)
        assert claim(tmp_path, config_of(stage, **change)) == folder

    def test_an_unused_folder_binds_to_nothing(self, tmp_path):
        claim(tmp_path, config_of("sft"))
        claim(tmp_path, config_of("sft", seed=7))

    def test_one_process_works_in_a_stage(self, tmp_path):
        """Others are refused until it is done; another stage may run beside it."""
        config = config_of("sft")
        with Workdir(tmp_path) as first:
            first.claim("sft", config)
            with pytest.raises(UserError) as error:
                claim(tmp_path, config)
            assert str(error.value) == (
                f"another process works in {tmp_path}/sft; wait for it, or choose another "
                "--workdir"
            )
            claim(tmp_path, config_of("dpo"))
        claim(tmp_path, config)

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_text", full)
            with pytest.raises(
                UserError, match="config.json .No space left on device.;"
            ):
                claim(tmp_path, config_of("sft"))
        claim(tmp_path, config_of("sft"))


def test_every_key_that_is_not_read_by_all_exists():
    """A renamed key would bind again without anybody's notice."""
    from mil_jax.train import workdir

    values = dataclasses.asdict(config_of("sft"))
    for path in [*workdir._READ_BY, *workdir._FREE]:
        node = values
        for name in path:
            assert name in node, path
            node = node[name]
