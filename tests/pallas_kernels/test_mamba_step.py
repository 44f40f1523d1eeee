"""A pure Mamba layer's step: the kernels against the package's reference operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mamba_step import Cache, Weights, mamba_step, pallas_triton

# batch, new tokens, slots, channels, states, low rank, taps
SIZES = {
    "one": (1, 1, 1, 32, 8, 3, 4),
    "catch_up": (1, 2, 4, 40, 16, 20, 4),
    "verify": (1, 3, 3, 32, 4, 8, 3),
    "rows": (2, 1, 3, 64, 8, 5, 2),
}


def inputs(size, dtype):
    batch, tokens, slots, e, n, rank, width = size
    m = rank + 2 * n
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def draw(*shape, gain=1.0, dtype=dtype):
        return (gain * jax.random.normal(next(keys), shape)).astype(dtype)

    f32 = jnp.float32
    weights = Weights(
        conv_kernel=draw(width, e, gain=0.6),
        conv_bias=draw(e, gain=0.5),
        maps=draw(m, e, gain=e**-0.5),
        dt_up=draw(e, rank, gain=rank**-0.5),
        dt_bias=draw(e) - 1,
        A_log=draw(e, n, gain=0.5, dtype=f32),
        D=draw(e, dtype=f32),
    )
    cache = Cache(
        state=draw(batch, e, n, dtype=f32),
        window=draw(batch, width - 1, e),
        xz=draw(batch, slots, 2 * e),
        x=draw(batch, slots, e),
        dt=draw(batch, slots, e),
        maps=draw(batch, slots, m),
    )
    return draw(batch, tokens, 2 * e), cache, weights


def written(cache, counts, tokens, commit):
    """What of a cache is defined: state, window, and each row's kept and new slots."""
    found = {"state": cache.state, "window": cache.window}
    e = cache.x.shape[2]
    for name, value in cache._asdict().items():
        if name in found:
            continue
        value = value[:, :, :e] if name == "xz" else value
        rows = []
        for b, count in enumerate(counts):
            stop = tokens if commit else count + tokens
            rows.append(value[b, :stop].reshape(-1))
        found[name] = jnp.concatenate(rows)
    return found


def compare(size, dtype, commit, counts, run, assert_close):
    xz, cache, weights = inputs(size, dtype)
    tokens = size[1]
    args = (xz, cache, jnp.array(counts, jnp.int32), weights)
    reference = jax.jit(mamba_step, static_argnames=("commit", "implementation"))
    want_y, want = reference(*args, commit=commit, implementation="reference")
    y, new = run(*args, commit=commit)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    assert_close(y, want_y, tolerance, "y")
    want = written(want, counts, tokens, commit)
    for name, value in written(new, counts, tokens, commit).items():
        assert_close(value, want[name], tolerance, name)
    for value in new:
        assert np.isfinite(np.asarray(value, np.float32)).all()


def kernels(*args, commit):
    return mamba_step(*args, commit=commit, implementation="pallas_triton")


CASES = [
    ("one", True, (1,)),
    ("one", True, (0,)),
    ("catch_up", True, (4,)),
    ("catch_up", False, (3,)),
    ("verify", True, (2,)),
    ("rows", True, (3, 1)),
    ("rows", False, (0, 2)),
]


@pytest.mark.parametrize(("name", "commit", "counts"), CASES)
def test_kernels_are_the_operations(name, commit, counts, interpreted, assert_close):
    compare(SIZES[name], "float32", commit, counts, kernels, assert_close)


def test_kernels_in_bfloat16(interpreted, assert_close):
    compare(SIZES["catch_up"], "bfloat16", False, (3,), kernels, assert_close)


@pytest.mark.parametrize(("name", "commit", "counts"), CASES[4:])
def test_the_convolution_may_be_a_kernel_of_its_own(
    name, commit, counts, interpreted, monkeypatch, assert_close
):
    monkeypatch.setattr(pallas_triton, "FEW_TOKENS", 0)
    compare(SIZES[name], "float32", commit, counts, kernels, assert_close)


@pytest.mark.parametrize(("name", "commit", "counts"), CASES[2:4])
def test_operations_in_a_row(name, commit, counts, assert_close):
    def run(*args, commit):
        return mamba_step(*args, commit=commit, implementation="composed")

    compare(SIZES[name], "float32", commit, counts, run, assert_close)


def test_every_program_writes_its_part_of_x(interpreted, monkeypatch, assert_close):
    """More tiles of channels than programs, and outputs left over."""
    monkeypatch.setattr(pallas_triton, "_conv_tile", lambda channels: (4, 1))
    monkeypatch.setattr(pallas_triton, "MAPS_PROGRAMS", 2)
    compare(SIZES["one"], "float32", True, (1,), kernels, assert_close)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 20, 20, 16, 4, 2, 4), "40 tokens"),
        ((3, 3, 3, 16, 4, 2, 4), "9 new tokens"),
        ((1, 1, 1, 16, 4, 2, 1), "one tap"),
    ],
)
def test_what_the_kernels_do_not_take(size, message, interpreted):
    xz, cache, weights = inputs(size, "float32")
    count = jnp.zeros((size[0],), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        kernels(xz, cache, count, weights, commit=True)


def test_wrong_arguments_are_refused():
    xz, cache, weights = inputs(SIZES["one"], "float32")
    count = jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="2 tokens do not fit into 1 slots"):
        mamba_step(jnp.concatenate([xz, xz], axis=1), cache, count, weights)
    for name in ("window", "maps", "x"):
        wrong = cache._replace(**{name: getattr(cache, name)[..., 1:]})
        with pytest.raises(ValueError, match=name):
            mamba_step(xz, wrong, count, weights)
    for name in ("conv_bias", "maps", "D", "A_log"):
        wrong = weights._replace(**{name: getattr(weights, name)[1:]})
        with pytest.raises(ValueError, match=name):
            mamba_step(xz, cache, count, wrong)


MAMBA_130M, MAMBA_2_8B = (1536, 16, 48, 4), (5120, 16, 160, 4)


@pytest.mark.parametrize(
    ("size", "commit", "kernels_in_all"),
    [
        ((1, 1, 5, *MAMBA_130M), False, 2),
        ((1, 2, 5, *MAMBA_130M), True, 2),
        ((1, 1, 1, *MAMBA_2_8B), True, 2),
        # The maps are the compiler's product.
        ((1, 5, 5, *MAMBA_2_8B), True, 2),
    ],
)
def test_lowers_to_few_kernels(size, commit, kernels_in_all, lower_for_cuda):
    arrays = jax.eval_shape(lambda: inputs(size, jnp.bfloat16))
    xz, cache, weights = arrays

    def run(xz, cache, count, weights):
        return kernels(xz, cache, count, weights, commit=commit)

    count = jax.ShapeDtypeStruct((size[0],), jnp.int32)
    text = lower_for_cuda(run, xz, cache, count, weights)
    assert text.count("__gpu$xla.gpu.triton") == kernels_in_all


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("size", "commit", "counts"),
    [
        ((1, 1, 5, *MAMBA_130M), False, (3,)),
        ((1, 2, 5, *MAMBA_130M), True, (4,)),
        ((1, 1, 1, *MAMBA_2_8B), True, (1,)),
        ((1, 5, 5, *MAMBA_2_8B), True, (3,)),
        ((2, 2, 5, *MAMBA_2_8B), True, (5, 0)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_are_the_operations(size, commit, counts, dtype, assert_close):
    run = jax.jit(kernels, static_argnames="commit")
    with jax.default_matmul_precision("highest"):
        compare(size, dtype, commit, counts, run, assert_close)
