"""Unit and property tests of packing."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil_jax.data.packing import lay_out, pack
from mil_jax.data.types import Example


def _naive_first_fit(lengths, max_length):
    bins, rooms = [], []
    for index, length in enumerate(lengths):
        for b, room in enumerate(rooms):
            if room >= length:
                bins[b].append(index)
                rooms[b] -= length
                break
        else:
            bins.append([index])
            rooms.append(max_length - length)
    return bins


def _example(*tokens, loss_from=1):
    mask = np.arange(len(tokens)) >= loss_from
    return Example(np.array(tokens, np.int32), mask)


class TestPack:
    def test_by_hand(self):
        assert pack([4, 7, 3, 6, 2, 3], 10) == [[0, 2, 4], [1, 5], [3]]

    def test_nothing(self):
        assert pack([], 8) == []

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 40))
    def test_properties(self, lengths, max_length):
        bins = pack(lengths, max_length)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        fills = [sum(lengths[i] for i in b) for b in bins]
        assert all(fill <= max_length for fill in fills)
        assert all(b == sorted(b) for b in bins)
        assert [b[0] for b in bins] == sorted(b[0] for b in bins)
        assert bins == _naive_first_fit(lengths, max_length)
        # First fit: no two bins could be one.
        assert all(a + b > max_length for a, b in zip(fills, fills[1:], strict=False))

    @pytest.mark.parametrize("length", [0, -1, 11])
    def test_bad_length(self, length):
        with pytest.raises(ValueError, match=f"document 1 has length {length}"):
            pack([3, length], 10)

    def test_is_fast(self):
        lengths = np.random.default_rng(0).integers(1, 2048, 100_000).tolist()
        start = time.process_time()
        bins = pack(lengths, 2048)
        assert time.process_time() - start < 5
        assert sum(lengths) / (len(bins) * 2048) > 0.95


class TestArrays:
    def test_by_hand(self):
        rows = lay_out(
            [[_example(5, 6, 7), _example(8, 9, loss_from=0)], [_example(4, 3)]],
            length=6,
            pad_id=1,
        )
        assert rows["tokens"].tolist() == [[5, 6, 7, 8, 9, 1], [4, 3, 1, 1, 1, 1]]
        assert rows["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
        # Token 8 starts a document: predicting it from the one before would be a leak.
        assert rows["loss_mask"].astype(int).tolist() == [
            [0, 1, 1, 0, 1, 0],
            [0, 1, 0, 0, 0, 0],
        ]
        dtypes = [rows[k].dtype for k in ("tokens", "loss_mask", "segment_ids")]
        assert dtypes == [np.int32, bool, np.int32]

    def test_too_long(self):
        with pytest.raises(ValueError, match="row 0 has 5 tokens; there is room for 4"):
            lay_out([[_example(1, 2, 3), _example(4, 5)]], length=4)
