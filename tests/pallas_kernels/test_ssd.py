"""SSD: unit, parity and property tests over every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import api, chunked, pallas_triton, shapes, ssd

OTHERS = [name for name in api.IMPLEMENTATIONS if name != "reference"]
BF16_INPUTS = ("x", "dt", "B", "C")

# Compiling dominates these tests: their programs run for a millisecond.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run without a GPU, as plain JAX."""
    monkeypatch.setattr(pallas_triton, "INTERPRET", jax.default_backend() != "gpu")


def make_inputs(shape, *, options=True, seed=0):
    """Float inputs by name; decays and outputs of the size seen in models."""
    rng = np.random.default_rng(seed)
    b, length, k, h, p, n = shape[:6]

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    inputs = {
        "x": normal(b, length, k, p),
        "dt": normal(b, length, h),
        "A": -np.exp(normal(h)),
        "B": normal(b, length, k, n),
        "C": normal(b, length, h, n),
    }
    if options:
        inputs |= {
            "D": normal(h),
            "dt_bias": normal(h) - 1.0,
            "initial_state": normal(b, h, n, p),
        }
    cotangents = (normal(b, length, h, p), normal(b, h, n, p))
    return inputs, cotangents


def scan_and_pull_back(implementation, inputs, ids, cotangents):
    """Outputs and the gradient of every float input."""

    def scan(inputs):
        return ssd(**inputs, segment_ids=ids, implementation=implementation)

    outputs, vjp = jax.vjp(scan, inputs)
    return outputs, vjp(cotangents)[0]


pull_back = quick_jit(scan_and_pull_back, static_argnames="implementation")


@functools.partial(quick_jit, static_argnames="implementation")
def forward(implementation, inputs, ids=None):
    return ssd(**inputs, segment_ids=ids, implementation=implementation)


def case(name, make_segments):
    shape = shapes.SMALL[name]
    inputs, cotangents = make_inputs(shape, options=name != "batch_1")
    ids = make_segments(
        np.random.default_rng(1), shape.batch, shape.length, shape.segments
    )
    return inputs, ids, cotangents


def tokens(inputs, start, stop):
    """The same inputs for tokens start:stop."""
    along = ("x", "dt", "B", "C")
    return {k: v[:, start:stop] if k in along else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", shapes.SMALL)
def test_reference_is_the_recurrence(name, make_segments, numpy_ssd, assert_tree_close):
    inputs, ids, _ = case(name, make_segments)
    expected = numpy_ssd(**inputs, segment_ids=ids)
    assert_tree_close(forward("reference", inputs, ids), expected, 2e-6)


def test_reference_gradients_are_the_differences(
    make_segments, numpy_ssd, directional_errors
):
    inputs, ids, cotangents = case("gqa_packed", make_segments)
    _, gradients = pull_back("reference", inputs, ids, cotangents)
    errors = directional_errors(
        lambda i: numpy_ssd(**i, segment_ids=ids),
        gradients,
        inputs,
        cotangents,
        np.random.default_rng(2),
    )
    assert set(errors) == set(inputs)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("implementation", OTHERS)
class TestEveryImplementation:
    @pytest.mark.parametrize("name", shapes.SMALL)
    def test_float32(self, implementation, name, make_segments, assert_tree_close):
        arguments = case(name, make_segments)
        expected = pull_back("reference", *arguments)
        assert_tree_close(pull_back(implementation, *arguments), expected, 1e-5)

    def test_bfloat16(self, implementation, make_segments, assert_tree_close):
        inputs, ids, (dy, dh) = case("gqa_packed", make_segments)
        low = {
            k: jnp.asarray(v, jnp.bfloat16) if k in BF16_INPUTS else v
            for k, v in inputs.items()
        }
        dy = jnp.asarray(dy, jnp.bfloat16)
        outputs, gradients = pull_back(implementation, low, ids, (dy, dh))
        up = {k: np.asarray(v).astype(np.float32) for k, v in low.items()}
        expected = pull_back(
            "reference", up, ids, (np.asarray(dy).astype(np.float32), dh)
        )
        assert_tree_close((outputs, gradients), expected, 1e-2)
        assert outputs[0].dtype == jnp.bfloat16 and outputs[1].dtype == jnp.float32
        assert all(gradients[k].dtype == low[k].dtype for k in low)

    def test_steps_of_any_size(self, implementation, make_segments, assert_tree_close):
        inputs, ids, cotangents = case("gqa_packed", make_segments)
        rng = np.random.default_rng(3)
        sizes = np.array([-1e9, -50.0, 0.0, 5.0, 1e3], np.float32)
        inputs["dt"] = rng.choice(sizes, inputs["dt"].shape)
        inputs["dt"][0, :2] = -1e9
        expected = pull_back("reference", inputs, ids, cotangents)
        assert_tree_close(
            pull_back(implementation, inputs, ids, cotangents), expected, 1e-5
        )

    def test_a_step_of_zero_keeps_the_state(self, implementation):
        inputs, cotangents = make_inputs(shapes.SMALL["one_group"])
        inputs["dt"] = np.full_like(inputs["dt"], -1e9)
        (y, h), gradients = pull_back(implementation, inputs, None, cotangents)
        np.testing.assert_array_equal(h, inputs["initial_state"])
        np.testing.assert_array_equal(gradients["dt"], 0.0)
        assert np.isfinite(y).all()
        assert all(np.isfinite(g).all() for g in gradients.values())

    def test_two_parts_are_the_whole(self, implementation, assert_tree_close):
        inputs, _ = make_inputs(shapes.SMALL["one_group"])
        whole = forward(implementation, inputs)
        y1, middle = forward(implementation, tokens(inputs, 0, 26))
        rest = tokens(inputs, 26, 63) | {"initial_state": middle}
        y2, final = forward(implementation, rest)
        joined = (np.concatenate([y1, y2], axis=1), final)
        assert_tree_close(joined, whole, 2e-6)

    def test_segments_are_separate_calls(self, implementation, assert_tree_close):
        inputs, _ = make_inputs(shapes.SMALL["one_group"])
        cuts = (0, 26, 27, 63)
        ids = np.repeat(np.array([[5, 2, 9]], np.int32), np.diff(cuts), axis=1)
        packed = forward(implementation, inputs, ids)
        parts = []
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            part = tokens(inputs, start, stop)
            if start:
                part["initial_state"] = np.zeros_like(part["initial_state"])
            parts.append(forward(implementation, part))
        separate = (np.concatenate([y for y, _ in parts], axis=1), parts[-1][1])
        assert_tree_close(packed, separate, 2e-6)

    def test_vmap_and_remat(self, implementation, make_segments, assert_tree_close):
        inputs, ids, cotangents = case("gqa_packed", make_segments)
        shared = {"A", "D", "dt_bias"}

        def row(inputs, ids):
            inputs = {k: v if k in shared else v[None] for k, v in inputs.items()}
            scan = functools.partial(ssd, implementation=implementation)
            y, h = jax.checkpoint(scan)(**inputs, segment_ids=ids[None])
            return y[0], h[0]

        axes = ({k: None if k in shared else 0 for k in inputs}, 0)

        @quick_jit
        def mapped(inputs):
            rows = jax.vmap(row, in_axes=axes)
            outputs, vjp = jax.vjp(lambda i: rows(i, ids), inputs)
            return outputs, vjp(cotangents)[0]

        expected = pull_back(implementation, inputs, ids, cotangents)
        assert_tree_close(mapped(inputs), expected, 2e-6)


COMPILED = {
    "paper_8b": shapes.LARGE["paper_8b_packed"]._replace(batch=1),
    "in_parts": shapes.Shape(1, 4096, 1, 2, 128, 128),
    "small_heads": shapes.Shape(2, 500, 2, 4, 64, 64, segments=3),
    "mha": shapes.Shape(2, 63, 3, 3, 64, 128),
    "odd_sizes": shapes.SMALL["gqa_packed"],
    "one_token": shapes.SMALL["one_token"],
}


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernel(name, dtype, make_segments, assert_tree_close):
    shape = COMPILED[name]
    inputs, (dy, dh) = make_inputs(shape)
    ids = make_segments(np.random.default_rng(1), *shape[:2], shape.segments)
    low = {
        k: jnp.asarray(v, dtype) if k in BF16_INPUTS else v for k, v in inputs.items()
    }
    dy = jnp.asarray(dy, dtype)
    run = jax.jit(scan_and_pull_back, static_argnums=0)
    actual = run("pallas_triton", low, ids, (dy, dh))
    up, up_dy = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (low, dy))
    expected = run("reference", up, ids, (up_dy, dh))
    assert_tree_close(actual, expected, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("chunk_size", [20, 64])
def test_chunk_size_changes_nothing(chunk_size, make_segments, assert_tree_close):
    inputs, ids, _ = case("gqa_packed", make_segments)
    scan = quick_jit(functools.partial(chunked.ssd, chunk_size=chunk_size))
    y = scan(**inputs, segment_ids=ids)
    assert_tree_close(y, forward("reference", inputs, ids), 2e-6)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("x", (2, 7, 6), "x has shape (2, 7, 6), expected [B L K P]"),
        ("dt", (2, 6, 6), "dt has shape (2, 6, 6), expected [B L H] = (2, 7, 6)"),
        ("A", (3,), "A has shape (3,), expected [H] = (6,)"),
        ("B", (2, 7, 6, 4), "B has shape (2, 7, 6, 4), expected [B L K N]"),
        ("C", (2, 7, 3, 4), "C has shape (2, 7, 3, 4), expected [B L H N]"),
        ("D", (3,), "D has shape (3,), expected [H] = (6,)"),
        ("dt_bias", (1,), "dt_bias has shape (1,), expected [H] = (6,)"),
        ("initial_state", (2, 6, 5, 4), "initial_state has shape (2, 6, 5, 4)"),
        ("segment_ids", (2, 8), "segment_ids has shape (2, 8), expected [B L]"),
        ("x", (2, 7, 4, 5), "x has 4 groups, which do not divide 6 channels"),
    ],
)
def test_shape_errors(name, size, message):
    sizes = {"x": (2, 7, 3, 5), "dt": (2, 7, 6), "A": (6,)}
    sizes |= {"B": (2, 7, 3, 4), "C": (2, 7, 6, 4), name: size}
    with pytest.raises(ValueError) as error:
        ssd(**{k: jnp.zeros(v) for k, v in sizes.items()})
    assert f"ssd: {message}" in str(error.value)
