"""Unit tests of the tokens that a draft may propose: counts, choice and file."""

import numpy as np
import pytest

from mil_jax.errors import UserError
from mil_jax.generate import draft_vocab


def test_counts():
    arrays = [np.array([3, 1, 3], np.int32), np.array([], np.int32), np.array([1, 3])]
    np.testing.assert_array_equal(draft_vocab.count(arrays, 5), [0, 2, 0, 3, 0])


def test_the_commonest_are_chosen_and_sorted():
    counts = np.array([5, 0, 9, 7, 0, 8])
    ids = draft_vocab.choose(counts, 3, ())
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [2, 3, 5])


def test_some_are_always_among_them():
    counts = np.array([5, 0, 9, 7, 0, 8])
    np.testing.assert_array_equal(draft_vocab.choose(counts, 3, (4, 2)), [2, 4, 5])


def test_of_equals_the_first_are_taken():
    np.testing.assert_array_equal(draft_vocab.choose(np.zeros(6), 3, (5,)), [0, 1, 5])


def test_written_and_read(tmp_path):
    assert draft_vocab.load(tmp_path) is None
    ids = np.array([1, 4, 6], np.int32)
    draft_vocab.save(tmp_path, ids)
    np.testing.assert_array_equal(draft_vocab.load(tmp_path), ids)
    assert [path.name for path in tmp_path.iterdir()] == [draft_vocab.FILE]


def test_damaged_file(tmp_path):
    (tmp_path / draft_vocab.FILE).write_bytes(b"\x93NUMPY broken")
    with pytest.raises(UserError, match="draft_vocab.npy is damaged .* write it again"):
        draft_vocab.load(tmp_path)


@pytest.mark.parametrize("ids", [[1, 1], [-1, 2], [], [[1, 2]], [0.5]])
def test_not_tokens(tmp_path, ids):
    draft_vocab.save(tmp_path, np.array(ids))
    with pytest.raises(UserError, match="does not hold tokens, each once"):
        draft_vocab.load(tmp_path)


def test_of_another_vocabulary(tmp_path):
    draft_vocab.save(tmp_path, np.array([1, 9], np.int32))
    assert len(draft_vocab.load(tmp_path, 10)) == 2
    with pytest.raises(UserError, match="holds token 9; the model has 9 tokens"):
        draft_vocab.load(tmp_path, 9)
