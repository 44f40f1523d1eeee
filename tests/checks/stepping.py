"""Prefill, decoding and taking back, followed token by token beside the oracle."""

import numpy as np

from mil_jax.models import cache

from . import tiny
from .compare import assert_close


class Session:
    """A batch in a cache, and what each row has been told.

    `rows` holds the tokens up to the committed state, `kept` those kept after it.
    """

    def __init__(self, kind, *, batch=3, max_length=32, max_step=4, model=None):
        self.model = model or tiny.model(kind)
        self.reference = tiny.reference(kind)
        self.atol = 1e-4
        self.cache = cache.init_cache(
            self.model.config,
            self.model.compute,
            batch=batch,
            max_length=max_length,
            max_step=max_step,
        )
        self.rows = [[] for _ in range(batch)]
        self.kept = [[] for _ in range(batch)]
        self.rng = np.random.default_rng(11)

    def prefill(self, counts, length):
        """Consumes `counts` of `length` random tokens."""
        tokens = self._draw(length)
        counts = np.asarray(counts, np.int32)
        logits, self.cache = tiny.prefill(self.model, tokens, counts, self.cache)
        for b, count in enumerate(counts):
            self.rows[b] += tokens[b, :count].tolist()
            if count:
                expected = self.reference(self.rows[b])[-1]
                self._compare(logits[b], expected, f"prefill, row {b}")
        self._check_lengths()

    def decode(self, count, keep, *, commit=True):
        """Runs `count` random tokens, then keeps `keep` after the committed state."""
        tokens = self._draw(count)
        logits, self.cache = tiny.decode(self.model, tokens, self.cache, commit=commit)
        for b, new in enumerate(tokens.tolist()):
            history = self.rows[b] + self.kept[b]
            expected = self.reference(history + new)[-count:]
            self._compare(logits[b], expected, f"decode {count}, row {b}")
            if commit:
                self.rows[b], self.kept[b] = history, []
            self.kept[b] = (self.kept[b] + new)[: keep[b]]
            assert len(self.kept[b]) == keep[b]
        self.cache = self.cache.keep(np.asarray(keep, np.int32))
        self._check_lengths()

    def _draw(self, count):
        shape = (len(self.rows), count)
        return self.rng.integers(0, tiny.VOCAB, shape).astype(np.int32)

    def _compare(self, actual, expected, name):
        assert_close(actual, expected, self.atol, name)

    def _check_lengths(self):
        lengths = [len(r) + len(k) for r, k in zip(self.rows, self.kept, strict=True)]
        assert self.cache.lengths.tolist() == lengths
        assert self.cache.num_pending.tolist() == [len(k) for k in self.kept]


def check_prefill(kind):
    """A ragged prompt, then the rest of it in a second call."""
    session = Session(kind)
    session.prefill([6, 3, 0], 6)
    session.prefill([2, 6, 5], 6)


def check_single_steps(kind):
    """One token at a time, all kept: plain decoding."""
    session = Session(kind)
    session.prefill([6, 3, 1], 6)
    for _ in range(6):
        session.decode(1, [1, 1, 1])


def check_rollback(kind):
    """Several tokens at a time of which each row keeps another number."""
    session = Session(kind)
    session.prefill([6, 3, 1], 6)
    for keep in ([4, 0, 2], [1, 3, 0], [0, 4, 1], [2, 2, 4]):
        session.decode(4, keep)


def check_chains(kind):
    """Calls that do not commit, taken back together."""
    session = Session(kind)
    session.prefill([6, 3, 1], 6)
    session.decode(2, [2, 1, 2])
    session.decode(1, [3, 2, 1], commit=False)
    session.decode(1, [4, 0, 2], commit=False)
    session.decode(2, [0, 1, 2])
    session.decode(1, [1, 0, 3], commit=False)
    session.decode(1, [1, 1, 1])


def check_full_cache():
    """A step that begins one token before the cache's last keeps what was there."""
    session = Session("attention", max_length=12)
    session.prefill([6, 6, 6], 6)
    session.decode(4, [4, 4, 4])
    session.decode(4, [1, 1, 1])
    session.decode(4, [1, 0, 1])
