"""Unit, property and crash tests of records on disk."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mil_jax
from mil_jax.data import records
from mil_jax.data.records import RecordSource, RecordWriter
from mil_jax.data.types import Example, Pair
from mil_jax.errors import UserError


def _example(index):
    """A different example for each index, of 1 to 20 tokens."""
    length = 1 + index % 20
    tokens = np.arange(length, dtype=np.int32) + 1000 * index
    return Example(tokens, tokens % 3 == 0)


def _assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, Pair):
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
        return
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _write(directory, count, shard_size=10, **kwargs):
    with RecordWriter(
        directory, fingerprint="f", shard_size=shard_size, **kwargs
    ) as writer:
        for i in range(writer.num_written, count):
            writer.write(_example(i))
    return writer


class TestSerialize:
    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.booleans())),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans())),
    )
    def test_round_trip(self, first, second):
        a, b = (
            Example(
                np.array([t for t, _ in rows], np.int32),
                np.array([m for _, m in rows], bool),
            )
            for rows in (first, second)
        )
        _assert_same(records.deserialize(records.serialize(a)), a)
        _assert_same(records.deserialize(records.serialize(Pair(a, b))), Pair(a, b))

    def test_bytes_are_stable(self):
        """The format on disk must not change under an unchanged version number."""
        example = Example(np.array([1, 258], np.int32), np.array([False, True]))
        assert records.serialize(example) == bytes(
            [1, 1, 2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 0, 0b10]
        )

    def test_other_version(self):
        data = b"\x09" + records.serialize(_example(0))[1:]
        with pytest.raises(UserError, match="format version 9, this program reads 1"):
            records.deserialize(data)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"tokens \(2,\) and loss_mask \(3,\)"):
            records.serialize(Example(np.zeros(2, np.int32), np.zeros(3, bool)))


class TestWriteAndRead:
    def test_examples(self, tmp_path):
        writer = _write(tmp_path, 25)
        assert writer.is_complete and writer.num_written == 25
        source = RecordSource(tmp_path)
        assert source.manifest.counts == (10, 10, 5)
        assert len(source) == 25
        for i in (0, 9, 10, 24):
            _assert_same(source[i], _example(i))
        _assert_same(source[-1], _example(24))
        assert [len(r.tokens) for r in source[3:6]] == [4, 5, 6]
        assert len(list(source)) == 25
        with pytest.raises(IndexError):
            source[25]

    def test_pairs(self, tmp_path):
        pairs = [Pair(_example(i), _example(i + 1)) for i in range(3)]
        with RecordWriter(tmp_path, fingerprint="f", kind="pair") as writer:
            for pair in pairs:
                writer.write(pair)
            with pytest.raises(ValueError, match="kind example, not pair"):
                writer.write(_example(0))
        source = RecordSource(tmp_path)
        for i, pair in enumerate(pairs):
            _assert_same(source[i], pair)

    def test_exact_multiple_of_the_shard_size(self, tmp_path):
        _write(tmp_path, 20)
        assert RecordSource(tmp_path).manifest.counts == (10, 10)

    def test_finished_shards_can_be_read_early(self, tmp_path):
        writer = RecordWriter(tmp_path, fingerprint="f", shard_size=4)
        for i in range(6):
            writer.write(_example(i))
        source = RecordSource(tmp_path, allow_incomplete=True)
        assert len(source) == 4
        writer.flush()
        assert len(RecordSource(tmp_path, allow_incomplete=True)) == 6


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from test_records import _example
from mil_jax.data import records

def die():
    os.kill(os.getpid(), signal.SIGKILL)

directory, point = sys.argv[1:3]
if point == "shard_without_manifest":
    replace = os.replace
    def replace_and_die(source, target):
        replace(source, target)
        if str(target).endswith("shard-00001.array_record"):
            die()
    records.os.replace = replace_and_die
with records.RecordWriter(directory, fingerprint="f", shard_size=10) as writer:
    for i in range(writer.num_written, 40):
        if point == "inside_shard" and i == 27:
            die()
        writer.write(_example(i))
"""


class TestCrash:
    @pytest.mark.parametrize(
        "point, safe", [("inside_shard", 20), ("shard_without_manifest", 10)]
    )
    def test_killed_writer_goes_on_without_loss_or_repeat(self, tmp_path, point, safe):
        folder = tmp_path / "records"
        root = Path(mil_jax.__file__).parents[1]
        here = str(Path(__file__).parent)
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder), point, here],
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{here}"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        with pytest.raises(UserError, match=f"is incomplete \\({safe} records"):
            RecordSource(folder)
        writer = RecordWriter(folder, fingerprint="f", shard_size=10)
        assert writer.num_written == safe
        assert not writer.is_complete
        assert not (folder / "shard.tmp").exists()
        _write(folder, 40)
        source = RecordSource(folder)
        assert len(source) == 40
        for i in range(40):
            _assert_same(source[i], _example(i))
        names = sorted(p.name for p in folder.iterdir())
        assert names == ["manifest.json"] + [
            f"shard-{i:05d}.array_record" for i in range(4)
        ]

    def test_error_in_the_loop_keeps_finished_shards_only(self, tmp_path):
        with pytest.raises(RuntimeError, match="boom"):
            with RecordWriter(tmp_path, fingerprint="f", shard_size=10) as writer:
                for i in range(15):
                    writer.write(_example(i))
                raise RuntimeError("boom")
        writer = RecordWriter(tmp_path, fingerprint="f", shard_size=10)
        assert (writer.num_written, writer.is_complete) == (10, False)

    @pytest.mark.parametrize("at", ["shard", "manifest"])
    def test_full_disk(self, tmp_path, monkeypatch, at):
        """One line; what was whole stays, and with room again the folder is completed."""
        from checks import disk  # Not where this module is imported by a crash test.

        random = np.random.default_rng(0)
        large = random.integers(0, 2**31, (9, 50_000), np.int64).astype(np.int32)
        examples = [_example(0), *(Example(row, row > 9) for row in large)]

        def write():
            with RecordWriter(tmp_path, fingerprint="f", shard_size=1) as writer:
                for i in range(writer.num_written, len(examples)):
                    writer.write(examples[i])

        with monkeypatch.context() as patch, disk.limited(150_000):
            if at == "manifest":
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                patch.setattr(
                    records.disk, "sync", Mock(side_effect=[*[None] * 3, full])
                )
            with pytest.raises(UserError) as error:
                write()
        reason = "File too large" if at == "shard" else "No space left on device"
        assert str(error.value) == (
            f"cannot write {tmp_path} ({reason}); free some space, the same command then "
            f"goes on after record {1 if at == 'shard' else 0}"
        )
        write()
        source = RecordSource(tmp_path)
        for found, expected in zip(source, examples, strict=True):
            _assert_same(found, expected)

    def test_resume_with_another_shard_size(self, tmp_path):
        writer = RecordWriter(tmp_path, fingerprint="f", shard_size=4)
        for i in range(7):
            writer.write(_example(i))
        del writer
        _write(tmp_path, 13, shard_size=6)
        source = RecordSource(tmp_path)
        assert source.manifest.counts == (4, 6, 3)
        for i in range(13):
            _assert_same(source[i], _example(i))

    def test_complete_folder_stays_as_it_is(self, tmp_path):
        _write(tmp_path, 12)
        before = (tmp_path / "manifest.json").read_bytes()
        assert _write(tmp_path, 12).num_written == 12
        assert (tmp_path / "manifest.json").read_bytes() == before
        with pytest.raises(UserError, match="is complete; nothing can be added"):
            RecordWriter(tmp_path, fingerprint="f").write(_example(12))


class TestErrors:
    def test_another_fingerprint_or_kind(self, tmp_path):
        _write(tmp_path, 3)
        with pytest.raises(UserError, match="fingerprint f; this run: example, g"):
            RecordWriter(tmp_path, fingerprint="g")
        with pytest.raises(UserError, match="choose another folder or delete"):
            RecordWriter(tmp_path, fingerprint="f", kind="pair")

    def test_edited_inputs(self, tmp_path):
        """Files that changed, came or went; folders that named none are left in peace."""
        folder = tmp_path / "stage" / "data"
        old = {"a.jsonl": "1", "b.jsonl": "2"}
        _write(folder, 3, inputs=old)
        for new, problem in (
            ({"a.jsonl": "1", "b.jsonl": "3"}, "b.jsonl has changed"),
            ({"a.jsonl": "1"}, "b.jsonl is gone"),
            (old | {"c.jsonl": "1"}, "c.jsonl is new"),
        ):
            with pytest.raises(UserError) as error:
                _write(folder, 3, inputs=new)
            assert str(error.value) == (
                f"{problem} since {folder} was made of it; put the data back as it was, "
                f"or delete {tmp_path}/stage to start over"
            )
        assert _write(folder, 3, inputs=old).is_complete
        _write(tmp_path / "other", 3)
        assert _write(tmp_path / "other", 3, inputs=old).is_complete

    def test_digest_is_of_the_content(self, tmp_path):
        digests = []
        for i, shift in enumerate((0, 0, 1)):
            with RecordWriter(tmp_path / str(i), fingerprint="f") as writer:
                for k in range(3):
                    writer.write(
                        Example(_example(k).tokens + shift, _example(k).loss_mask)
                    )
            digests.append(RecordSource(tmp_path / str(i)).digest())
        assert digests[0] == digests[1] != digests[2]

    def test_shards_without_manifest(self, tmp_path):
        (tmp_path / "x.array_record").write_bytes(b"")
        with pytest.raises(UserError, match="holds x.array_record but no manifest"):
            RecordWriter(tmp_path, fingerprint="f")

    def test_source_of_nothing(self, tmp_path):
        with pytest.raises(UserError, match="gone does not exist"):
            RecordSource(tmp_path / "gone")
        with pytest.raises(UserError, match="is not a folder of records"):
            RecordSource(tmp_path)
        _write(tmp_path, 0)
        with pytest.raises(UserError, match="holds no records"):
            RecordSource(tmp_path)

    def test_damage(self, tmp_path):
        _write(tmp_path, 25)
        manifest = tmp_path / "manifest.json"
        text = manifest.read_text()
        values = json.loads(text)
        manifest.write_text(json.dumps(values | {"counts": [10, 10, 6]}))
        with pytest.raises(UserError, match="25 records but its manifest says 26"):
            RecordSource(tmp_path)
        manifest.write_text(json.dumps(values | {"version": 2}))
        with pytest.raises(UserError, match="does not have format version 1"):
            RecordSource(tmp_path)
        manifest.write_text(text[:30])
        with pytest.raises(UserError, match="manifest.json is damaged"):
            RecordSource(tmp_path)
        manifest.write_text(text)
        (tmp_path / "shard-00001.array_record").unlink()
        with pytest.raises(UserError, match="shard-00001.array_record is missing"):
            RecordSource(tmp_path)
        with pytest.raises(UserError, match="shard-00001.array_record is missing"):
            RecordWriter(tmp_path, fingerprint="f")

    def test_shard_that_is_no_array_record(self, tmp_path):
        _write(tmp_path, 5)
        (tmp_path / "shard-00000.array_record").write_bytes(b"nonsense" * 100)
        with pytest.raises(UserError):
            RecordSource(tmp_path)
