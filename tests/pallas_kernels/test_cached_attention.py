"""Attention to a cache: every implementation against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.cached_attention import (
    api,
    cached_attention,
    pallas_triton,
    rotate_and_append,
    shapes,
    xla,
)

IMPLEMENTATIONS = list(api.IMPLEMENTATIONS)

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def small_blocks(monkeypatch):
    """Several parts and blocks at sizes that run on a CPU."""

    def choose(q, k):
        queries = q.shape[1] * (q.shape[2] // k.shape[2])
        if queries > 32:
            return pallas_triton.Tiling(32, 16, 1, 4, 2)
        return pallas_triton.Tiling(16, 16, 3, 4, 2)

    monkeypatch.setattr(pallas_triton, "choose_tiling", choose)
    monkeypatch.setattr(pallas_triton, "MANY_ROWS", 32)
    monkeypatch.setattr(xla, "MAX_SCORES", 2 * 40 * 100)
    monkeypatch.setattr(xla, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(xla, "BLOCK_SLOTS", 32)


def make(shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size).astype(dtype)

    b, t, s, _, h, k, p, _ = shape
    return {
        "q": normal(b, t, h, p),
        "k": normal(b, s, k, p),
        "v": normal(b, s, k, p),
    }


def ragged(shape):
    """An empty row, a full one, and one in between."""
    last = shape.slots - shape.tokens
    return np.array([0, last, shape.length][-shape.batch :], np.int32)


def expected_outputs(q, k, v, lengths, window):
    """One query at a time, from the formula."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros_like(q)
    per_group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        position = lengths[b] + t
        first = 0 if window is None else max(0, position - window + 1)
        keys = k[b, first : position + 1, h // per_group]
        values = v[b, first : position + 1, h // per_group]
        weights = np.exp(keys @ q[b, t, h] / np.sqrt(q.shape[3]))
        y[b, t, h] = weights @ values / weights.sum()
    return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", shapes.SMALL)
def test_ragged_rows(name, implementation, small_blocks, assert_close):
    shape = shapes.SMALL[name]
    inputs, lengths = make(shape), ragged(shape)
    attention = functools.partial(
        cached_attention, sliding_window=shape.window, implementation=implementation
    )
    y = quick_jit(attention)(lengths=jnp.asarray(lengths), **inputs)
    expected = expected_outputs(lengths=lengths, window=shape.window, **inputs)
    assert_close(y, expected, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_by_hand(implementation):
    """Two query heads share one kv head; scores of 0 and ln 3 weigh 1 to 3."""
    q = jnp.array([[[[1.0, 0.0], [0.0, 0.0]]]])
    k = jnp.array([[[[0.0, 5.0]], [[np.log(3) * np.sqrt(2), 0.0]], [[99.0, 99.0]]]])
    v = jnp.array([[[[4.0, 0.0]], [[0.0, 8.0]], [[1e6, 1e6]]]])
    lengths = jnp.array([1], jnp.int32)
    y = cached_attention(q, k, v, lengths, implementation=implementation)
    np.testing.assert_allclose(y, [[[[1.0, 6.0], [2.0, 4.0]]]], rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_query_heads_read_their_own_kv_head(implementation):
    v = jnp.array([[[[1.0, 1.0], [2.0, 2.0]]]])
    ones = (jnp.ones((1, 1, 4, 2)), jnp.ones((1, 1, 2, 2)))
    lengths = jnp.zeros((1,), jnp.int32)
    y = cached_attention(*ones, v, lengths, implementation=implementation)
    np.testing.assert_array_equal(y[0, 0, :, 0], [1.0, 1.0, 2.0, 2.0])


@pytest.mark.parametrize("implementation", ["pallas_triton", "xla"])
@pytest.mark.parametrize("width", [64, 128])
def test_sizes_of_models(width, implementation, assert_close):
    shape = shapes.Shape(2, 17, 300, 200, 8, 1, width)
    inputs, lengths = make(shape), ragged(shape)
    attention = functools.partial(cached_attention, implementation=implementation)
    y = quick_jit(attention)(lengths=jnp.asarray(lengths), **inputs)
    expected = expected_outputs(lengths=lengths, window=None, **inputs)
    assert_close(y, expected, 2e-6)


@pytest.mark.parametrize("implementation", ["pallas_triton", "xla"])
class TestImplementations:
    shape = shapes.SMALL["grouped"]

    def test_bfloat16(self, implementation, small_blocks, assert_close):
        low = make(self.shape, dtype=jnp.bfloat16)
        up = {k: v.astype(np.float32) for k, v in low.items()}
        lengths = jnp.asarray(ragged(self.shape))
        found, exact = (
            quick_jit(functools.partial(cached_attention, implementation=name))
            for name in (implementation, "reference")
        )
        y = found(lengths=lengths, **low)
        assert_close(y, exact(lengths=lengths, **up), 1e-2)
        assert y.dtype == jnp.bfloat16

    def test_large_scores(self, implementation, small_blocks, assert_close):
        inputs, lengths = make(self.shape), ragged(self.shape)
        inputs["q"] *= 100.0
        attention = functools.partial(cached_attention, implementation=implementation)
        y = quick_jit(attention)(lengths=jnp.asarray(lengths), **inputs)
        expected = expected_outputs(lengths=lengths, window=None, **inputs)
        assert_close(y, expected, 1e-5)

    def test_slots_after_the_last_token_do_not_count(
        self, implementation, small_blocks
    ):
        inputs, lengths = make(self.shape), ragged(self.shape)
        attention = quick_jit(
            functools.partial(cached_attention, implementation=implementation)
        )
        y = attention(lengths=jnp.asarray(lengths), **inputs)
        for b, length in enumerate(lengths):
            for name in ("k", "v"):
                inputs[name][b, length + self.shape.tokens :] = 1e4
        other = attention(lengths=jnp.asarray(lengths), **inputs)
        np.testing.assert_array_equal(y, other)

    def test_chunks_equal_one_call(self, implementation, small_blocks, assert_close):
        shape = shapes.Shape(2, 96, 96, 0, 4, 2, 8)
        inputs = make(shape)
        attention = quick_jit(
            functools.partial(cached_attention, implementation=implementation)
        )
        zero = jnp.zeros((2,), jnp.int32)
        whole = attention(lengths=zero, **inputs)
        cuts = (0, 40, 41, 57, 96)
        parts = [
            attention(lengths=zero + a, **(inputs | {"q": inputs["q"][:, a:b]}))
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        assert_close(np.concatenate(parts, axis=1), whole, 1e-6)


def test_blocks_of_scores_are_bounded(monkeypatch):
    """The program for many tokens holds no array of all its scores."""
    monkeypatch.setattr(xla, "MAX_SCORES", 1 << 16)
    shape = shapes.Shape(1, 1024, 4096, 3000, 4, 2, 8)
    inputs = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in make(shape).items()}
    inputs["lengths"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    attention = functools.partial(cached_attention, implementation="xla")
    analysis = jax.jit(attention).lower(**inputs).compile().memory_analysis()
    scores = 4 * xla.BLOCK_TOKENS * xla.BLOCK_SLOTS * 4
    assert analysis.temp_size_in_bytes < 8 * scores < 4 * 1024 * 4096 * 4


@pytest.mark.parametrize(
    ("tokens", "slots"), [(1, 16), (1, 1280), (5, 1280), (17, 1280), (2048, 32768)]
)
def test_tilings_cover_the_queries(tokens, slots):
    shape = shapes.Shape(1, tokens, slots, 0, 32, 8, 128)
    inputs = {k: jax.ShapeDtypeStruct(s, jnp.bfloat16) for k, s in sizes(shape).items()}
    tiling = pallas_triton.choose_tiling(inputs["q"], inputs["k"])
    powers = (tiling.rows, tiling.slots, tiling.num_warps)
    assert all(n & (n - 1) == 0 for n in powers) and min(powers[:2]) >= 16
    assert tiling.splits >= 1 and tiling.splits * 16 <= max(slots, 16)


def sizes(shape):
    kept = (shape.batch, shape.slots, shape.kv_heads, shape.head_dim)
    q = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return {"q": q, "k": kept, "v": kept}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": np.ones((3, 5, 8))}, "q has shape (3, 5, 8), expected [B T H P]"),
        ({"k": np.ones((2, 70, 2, 16))}, "k has shape (2, 70, 2, 16), expected"),
        ({"v": np.ones((3, 69, 2, 16))}, "v has shape (3, 69, 2, 16), expected"),
        ({"lengths": np.zeros(2, int)}, "lengths has shape (2,), expected [B] = (3,)"),
        ({"q": np.ones((3, 5, 9, 16))}, "k has 2 groups, which do not divide 9"),
        ({"sliding_window": 0}, "sliding_window is 0, expected 1 or more"),
        ({"implementation": "fast"}, "implementation 'fast' is not one of"),
    ],
)
def test_errors(changes, message):
    inputs = make(shapes.SMALL["grouped"]) | {"lengths": np.zeros(3, np.int32)}
    with pytest.raises(ValueError) as error:
        cached_attention(**(inputs | changes))
    assert f"cached_attention: {message}" in str(error.value)


def test_kernels_pass_over_what_they_cannot_run(monkeypatch):
    inputs = make(shapes.SMALL["one_token"]) | {"lengths": jnp.zeros(3, jnp.int32)}
    wide = {k: np.repeat(inputs[k], 64, axis=3) for k in ("q", "k", "v")}
    name = {"implementation": "pallas_triton"}
    with pytest.raises(NotImplementedError, match="heads of 512 are wider than 256"):
        cached_attention(**(inputs | wide), **name)
    monkeypatch.setattr(gpu, "INTERPRET", False)
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU, this is a cpu"):
        cached_attention(**inputs, **name)
    assert np.isfinite(cached_attention(**inputs)).all()


def make_append(tokens, heads=4, groups=2, width=8, dtype=np.float32):
    rng = np.random.default_rng(0)

    def normal(*size):
        return rng.standard_normal(size).astype(dtype)

    return {
        "qkv": normal(3, tokens, (heads + 2 * groups) * width),
        "k": normal(3, 20, groups, width),
        "v": normal(3, 20, groups, width),
        "lengths": np.array([0, 7, 20 - tokens], np.int32),
        "frequencies": rng.uniform(0, 1, width // 2).astype(np.float32),
    }


def expected_append(qkv, k, v, lengths, frequencies):
    """One pair at a time, as multiplication by e^(i angle)."""
    heads = qkv.astype(np.float64).reshape(*qkv.shape[:2], -1, k.shape[3])
    groups, half = k.shape[2], k.shape[3] // 2
    k, v = k.astype(np.float64), v.astype(np.float64)
    turned = np.zeros_like(heads)
    for b, t, h, i in np.ndindex(*heads.shape[:3], half):
        pair = complex(heads[b, t, h, i], heads[b, t, h, i + half])
        pair *= np.exp(1j * (lengths[b] + t) * np.float64(frequencies[i]))
        turned[b, t, h, [i, i + half]] = pair.real, pair.imag
    for b, t in np.ndindex(*heads.shape[:2]):
        k[b, lengths[b] + t] = turned[b, t, -2 * groups : -groups]
        v[b, lengths[b] + t] = heads[b, t, -groups:]
    return turned[:, :, : -2 * groups], k, v


@pytest.mark.parametrize("implementation", api.APPEND_IMPLEMENTATIONS)
class TestAppend:
    @pytest.mark.parametrize("sizes", [(1,), (5, 4, 4, 6), (3, 6, 2, 16)])
    def test_values(self, sizes, implementation, assert_tree_close):
        inputs = make_append(*sizes)
        append = functools.partial(rotate_and_append, implementation=implementation)
        expected = expected_append(**inputs)
        assert_tree_close(quick_jit(append)(**inputs), expected, 2e-6)

    def test_bfloat16(self, implementation, assert_tree_close):
        low = make_append(5, dtype=jnp.bfloat16)
        up = {
            k: v.astype(v.dtype if v.dtype == np.int32 else np.float32)
            for k, v in low.items()
        }
        append = functools.partial(rotate_and_append, implementation=implementation)
        found = quick_jit(append)(**low)
        assert_tree_close(found, expected_append(**up), 1e-2)
        assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": np.ones((3, 20, 2, 9))}, "v has shape (3, 20, 2, 9), expected"),
        ({"lengths": np.zeros(2, int)}, "lengths has shape (2,), expected [B] = (3,)"),
        ({"frequencies": np.ones(3)}, "frequencies has shape (3,), expected [P/2]"),
        ({"qkv": np.ones((3, 2, 65))}, "qkv has 65 columns, no queries, 2 keys"),
        ({"qkv": np.ones((3, 2, 32))}, "qkv has 32 columns, no queries, 2 keys"),
    ],
)
def test_append_errors(changes, message):
    with pytest.raises(ValueError) as error:
        rotate_and_append(**(make_append(2) | changes))
    assert f"rotate_and_append: {message}" in str(error.value)
