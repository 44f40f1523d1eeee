"""Unit and property tests of batches: order, resuming, processes, truncation."""

import numpy as np
import pytest

from mil_jax.data import pipeline
from mil_jax.data.records import RecordSource, RecordWriter
from mil_jax.data.types import Example, Pair
from mil_jax.errors import UserError


def _example(first, length, answer_from=1):
    """Tokens `first`, `first` + 1, ...; no two examples here share a first token."""
    tokens = np.arange(first, first + length, dtype=np.int32)
    return Example(tokens, np.arange(length) >= answer_from)


def _examples(count, length=4):
    return [_example(100 * i + 1, length) for i in range(count)]


def _batches(source, **kwargs):
    defaults = dict(
        batch_size=4, length=8, packed=False, seed=0, num_epochs=1, pad_id=0
    )
    return pipeline.batches(source, **(defaults | kwargs))


def _firsts(batch):
    """The first tokens of the documents of a batch."""
    ids = batch["segment_ids"]
    before = np.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    return batch["tokens"][(ids > 0) & (ids != before)].tolist()


def _assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


class TestBatches:
    def test_by_hand_without_shuffling(self):
        source = [_example(10, 3), _example(20, 5, answer_from=3)]
        (batch,) = _batches(source, batch_size=2, length=6, pad_id=9, shuffle=False)
        assert batch["tokens"].tolist() == [
            [10, 11, 12, 9, 9, 9],
            [20, 21, 22, 23, 24, 9],
        ]
        assert batch["loss_mask"].astype(int).tolist() == [
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 0],
        ]
        assert batch["segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
        assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
        assert batch["loss_mask"].dtype == bool

    def test_each_epoch_has_every_example_once_in_a_new_order(self):
        dataset = _batches(_examples(12), num_epochs=3)
        assert len(dataset) == 9
        epochs = [
            [f for i in range(3) for f in _firsts(dataset[3 * epoch + i])]
            for epoch in range(3)
        ]
        everything = [100 * i + 1 for i in range(12)]
        assert all(sorted(epoch) == everything for epoch in epochs)
        assert everything != epochs[0] != epochs[1] != epochs[2] != epochs[0]

    def test_epochs_join_without_a_gap(self):
        dataset = _batches(_examples(6), num_epochs=3)
        assert len(dataset) == 18 // 4
        seen = [f for i in range(3) for f in _firsts(dataset[i])]
        assert sorted(seen[:6]) == sorted(seen[6:]) == [100 * i + 1 for i in range(6)]

    def test_fewer_examples_than_a_batch(self):
        dataset = _batches(_examples(3), num_epochs=None)
        assert len(dataset) > 10**9
        assert len(set(_firsts(dataset[0])[:3])) == 3
        with pytest.raises(UserError, match="3 rows in 1 epochs do not fill one batch"):
            _batches(_examples(3))

    def test_batch_of_a_step_depends_on_nothing_else(self):
        source = _examples(50)
        dataset = _batches(source, num_epochs=None, packed=True, length=9)
        in_order = [dataset[i] for i in range(30)]
        fresh = _batches(source, num_epochs=None, packed=True, length=9)
        for step in (29, 7, 0, 18):
            _assert_equal(fresh[step], in_order[step])
        iterator = iter(fresh[17:].to_iter_dataset())
        _assert_equal(next(iterator), in_order[17])

    def test_seed_decides_the_order(self):
        orders = [_firsts(_batches(_examples(40), seed=s)[0]) for s in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]

    @pytest.mark.parametrize("packed", [False, True])
    def test_processes_share_the_global_batch(self, packed):
        kwargs = dict(num_epochs=2, batch_size=6, packed=packed, length=10)
        whole = _batches(_examples(40), **kwargs)
        parts = [
            _batches(_examples(40), **kwargs, process_index=p, process_count=3)
            for p in range(3)
        ]
        for step in range(len(whole)):
            shares = [part[step] for part in parts]
            assert all(share["tokens"].shape == (2, 10) for share in shares)
            joined = {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
            _assert_equal(joined, whole[step])

    def test_packing_keeps_documents_whole(self):
        rng = np.random.default_rng(0)
        source = [_example(100 * i + 1, int(rng.integers(2, 17))) for i in range(60)]
        dataset = _batches(source, length=16, packed=True, batch_size=1)
        seen = {}
        for i in range(len(dataset)):
            batch = dataset[i]
            for segment in range(1, batch["segment_ids"].max() + 1):
                inside = batch["segment_ids"] == segment
                tokens = batch["tokens"][inside]
                assert not batch["loss_mask"][inside][0]
                assert batch["loss_mask"][inside][1:].all()
                seen[int(tokens[0])] = tokens.tolist()
        assert len(dataset) < 40
        assert sorted(seen.values()) == [e.tokens.tolist() for e in source]

    def test_from_records(self, tmp_path):
        with RecordWriter(tmp_path, fingerprint="f", shard_size=3) as writer:
            for example in _examples(8):
                writer.write(example)
        on_disk = _batches(RecordSource(tmp_path), packed=True)
        _assert_equal(on_disk[0], _batches(_examples(8), packed=True)[0])


class TestTruncation:
    def test_long_examples_lose_their_end_and_are_counted(self, monkeypatch):
        lines = []
        monkeypatch.setattr(
            pipeline.log, "warning", lambda text, *args: lines.append(text % args)
        )
        source = [
            _example(100, 12),
            _example(200, 4),
            _example(300, 9, answer_from=8),
            _example(400, 3, answer_from=3),
        ]
        (batch,) = _batches(source, batch_size=2, shuffle=False)
        assert _firsts(batch) == [100, 200]
        assert batch["tokens"][0].tolist() == list(range(100, 108))
        assert lines == [
            "2 of 4 records cut to 8 tokens",
            "2 of 4 records skipped: without an answer",
        ]

    def test_nothing_left(self):
        with pytest.raises(UserError, match="none of the 1 records has an answer"):
            _batches([_example(1, 9, answer_from=8)])

    def test_loss_at_the_first_token_alone_is_no_answer(self):
        lonely = Example(np.array([5, 6], np.int32), np.array([True, False]))
        with pytest.raises(UserError, match="none of the 1 records"):
            _batches([lonely], batch_size=1)


def _pair(first, prompt, chosen, rejected):
    """A pair with `prompt` prompt tokens and answers of the given lengths."""
    a = _example(first, prompt + chosen, answer_from=prompt)
    b = _example(first, prompt + rejected, answer_from=prompt)
    b.tokens[prompt:] += 50
    return Pair(a, b)


def _pair_batches(source, **kwargs):
    defaults = dict(
        batch_size=1,
        length=8,
        max_prompt_length=4,
        seed=0,
        num_epochs=1,
        pad_id=0,
        shuffle=False,
    )
    return pipeline.pair_batches(source, **(defaults | kwargs))


class TestPairBatches:
    def test_prompt_is_cut_left_and_answer_right(self):
        (batch,) = _pair_batches([_pair(10, 6, 3, 7)])
        assert batch["chosen_tokens"].tolist() == [[12, 13, 14, 15, 16, 17, 18, 0]]
        assert batch["chosen_loss_mask"].astype(int).tolist() == [
            [0, 0, 0, 0, 1, 1, 1, 0]
        ]
        assert batch["chosen_segment_ids"].tolist() == [[1] * 7 + [0]]
        assert batch["rejected_tokens"].tolist() == [[12, 13, 14, 15, 66, 67, 68, 69]]
        assert batch["rejected_loss_mask"].astype(int).tolist() == [[0] * 4 + [1] * 4]
        assert set(batch) == {
            f"{side}_{name}"
            for side in ("chosen", "rejected")
            for name in ("tokens", "loss_mask", "segment_ids")
        }

    def test_short_pairs_stay_whole(self):
        (batch,) = _pair_batches([_pair(10, 2, 3, 1)])
        assert batch["chosen_tokens"].tolist() == [[10, 11, 12, 13, 14, 0, 0, 0]]
        assert batch["rejected_tokens"].tolist() == [[10, 11, 62, 0, 0, 0, 0, 0]]

    def test_useless_pairs_are_skipped(self):
        same = _example(10, 5, answer_from=3)
        empty = Example(same.tokens, np.zeros(5, bool))
        source = [Pair(same, same), Pair(same, empty), _pair(30, 3, 2, 2)]
        dataset = _pair_batches(source)
        assert len(dataset) == 1
        assert dataset[0]["chosen_tokens"][0, 0] == 30
        with pytest.raises(UserError, match="none of the 2 records"):
            _pair_batches(source[:2])

    def test_processes_share_the_global_batch(self):
        source = [_pair(200 * i, 3, 2, 3) for i in range(8)]
        kwargs = dict(batch_size=4, shuffle=True, num_epochs=2)
        whole = _pair_batches(source, **kwargs)
        parts = [
            _pair_batches(source, **kwargs, process_index=p, process_count=2)
            for p in range(2)
        ]
        for step in range(4):
            joined = {
                k: np.concatenate([part[step][k] for part in parts])
                for k in whole[step]
            }
            _assert_equal(joined, whole[step])

    @pytest.mark.parametrize("max_prompt_length", [0, 8])
    def test_no_room_for_an_answer(self, max_prompt_length):
        with pytest.raises(UserError, match="must be between 1 and length - 1 = 7"):
            _pair_batches([_pair(1, 2, 2, 2)], max_prompt_length=max_prompt_length)


class TestErrors:
    def test_wrong_kind_of_records(self):
        with pytest.raises(UserError, match="type Pair, this stage needs Example"):
            _batches([_pair(1, 2, 2, 2)])
        with pytest.raises(UserError, match="type Example, this stage needs Pair"):
            _pair_batches(_examples(2))

    def test_uneven_processes(self):
        with pytest.raises(UserError, match="batch_size 4 does not divide among 3"):
            _batches(_examples(9), process_count=3)
        with pytest.raises(ValueError, match="process_index 2 of 2"):
            _batches(_examples(9), process_index=2, process_count=2)
