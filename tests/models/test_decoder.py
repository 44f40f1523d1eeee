import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import sequences, stacking, stepping, tiny

from mil_jax.config import ComputeConfig
from mil_jax.errors import UserError
from mil_jax.models import decoder, mamba

pytestmark = pytest.mark.usefixtures("strict_jax")
SSM_KINDS = ["mamba", "mamba2", "pure"]
every_kind = pytest.mark.parametrize("kind", tiny.CONFIGS)


@every_kind
def test_forward_is_the_formula(kind):
    sequences.check_forward(kind)


@every_kind
def test_packed_documents_are_the_documents_alone(kind):
    sequences.check_packed(kind)


@every_kind
def test_padding_on_either_side_changes_nothing(kind):
    sequences.check_padded(kind)


@every_kind
def test_gradients_of_packed_documents_add_up(kind):
    sequences.check_packed_gradients(kind)


@every_kind
def test_gradient_is_the_formulas(kind):
    sequences.check_gradient_direction(kind)


@every_kind
def test_prefill_in_parts(kind):
    stepping.check_prefill(kind)


@every_kind
def test_decoding_one_by_one(kind):
    stepping.check_single_steps(kind)


@every_kind
def test_decoding_and_taking_back(kind):
    stepping.check_rollback(kind)


@every_kind
def test_decoding_without_commit(kind):
    stepping.check_chains(kind)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        pytest.param(
            "mamba",
            {"scan_layers": False},
            {"scan_layers": True, "remat": True},
            marks=pytest.mark.slow,
        ),
        ("mamba2", {"scan_layers": True}, {"scan_layers": False, "remat": True}),
        pytest.param(
            "mamba2",
            {"remat": True, "remat_keeps": "products"},
            {"remat": True, "remat_keeps": "nothing"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scanned_and_rematerialised_layers_are_the_layers(kind, first, second):
    stacking.check_scan_and_remat(kind, first, second)


@pytest.mark.parametrize("every", [64, 2])
def test_scans_keep_as_many_states_as_configured(every, monkeypatch):
    asked, scan = set(), mamba.selective_scan

    def record(*args, checkpoint_every, **kwargs):
        asked.add(checkpoint_every)
        return scan(*args, checkpoint_every=checkpoint_every, **kwargs)

    monkeypatch.setattr(mamba, "selective_scan", record)
    changes = {} if every == 64 else {"scan_checkpoint_every": every}
    with tiny.fresh_traces():
        model = tiny.build(tiny.CONFIGS["mamba"], tiny.params("mamba"), **changes)
        jax.eval_shape(model, tiny.tokens(1, 8))
    assert asked == {every}


@pytest.mark.parametrize("kind", ["attention", "mamba", "mamba2"])
def test_remat_keeps_products(kind):
    stacking.check_products_are_kept(kind)


def test_one_scanned_kind_is_the_formula():
    stacking.check_scanned_forward(("mamba2",) * 3)


@pytest.mark.parametrize(
    ("layer_types", "period"),
    [
        ("a", 1),
        ("aaaa", 1),
        ("mama", 2),
        ("maaamaaa", 4),
        ("mamam", 5),
        ("maaa", 4),
        ("mmam", 4),
    ],
)
def test_find_period(layer_types, period):
    assert decoder.find_period(tuple(layer_types)) == period


@pytest.mark.parametrize("scan", [True, False])
def test_unstack_is_the_inverse_of_place(scan):
    stacking.check_unstack(scan)


def test_stacked_weights_have_names_axes_and_shapes():
    plan = decoder.Blueprint.create(stacking.config("mamba"), ComputeConfig())
    key = "layers.0::2.mamba.x_proj.kernel"
    assert (plan.period, plan.repeats) == (2, 2)
    assert plan.abstract()[key].shape == (2, 32, 32)
    assert plan.logical_axes()[key] == ("layers", "embed", "d_xb")
    assert plan.abstract()["embed.embedding"].shape == (tiny.VOCAB, 32)
    assert plan.logical_axes()["layers.1::2.attn.k_proj.kernel"][-1] == "kv_heads"
    ranks = {k: len(v.shape) for k, v in plan.abstract().items()}
    assert ranks == {k: len(v) for k, v in plan.logical_axes().items()}


def test_weights_are_stored_as_asked_but_for_the_recurrences():
    config = stacking.config("mamba")
    compute = ComputeConfig(param_dtype="bfloat16")
    plan = decoder.Blueprint.create(config, compute)
    weights = plan.place(stacking.params("mamba"))
    assert {k: v.dtype for k, v in weights.items()} == {
        k: jnp.float32 if k.endswith(("A_log", ".D", "dt_bias")) else jnp.bfloat16
        for k in weights
    }
    halves = plan.place(stacking.params("mamba"), dtype_of=lambda _: jnp.float16)
    assert {v.dtype for v in halves.values()} == {jnp.dtype("float16")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("layers.1.attn.o_proj.kernel"), "o_proj.kernel is missing"),
        (lambda p: p.update(extra=np.zeros(1)), "weight extra is unknown"),
        (
            lambda p: p.update({"layers.0.mamba.D": np.zeros(3, np.float32)}),
            r"layers.0.mamba.D has shape \(3,\); this model needs \(64,\)",
        ),
    ],
)
def test_wrong_weights_are_refused(change, message):
    params = dict(tiny.params("mamba"))
    change(params)
    with pytest.raises(UserError, match=message):
        tiny.build(tiny.CONFIGS["mamba"], params)


@pytest.mark.parametrize(
    "kind",
    ["attention", pytest.param("rich", marks=pytest.mark.slow), *SSM_KINDS],
)
def test_bfloat16_is_near_float32(kind):
    # JAX's own attention promotes.
    with jax.numpy_dtype_promotion("standard"):
        stacking.check_bfloat16(kind)


@pytest.mark.parametrize(
    "kind", [pytest.param("mamba", marks=pytest.mark.slow), "mamba2"]
)
def test_bfloat16_gradients_are_near_float32(kind):
    with jax.numpy_dtype_promotion("standard"):
        stacking.check_bfloat16_gradients(kind)


@pytest.mark.parametrize("kind", SSM_KINDS)
def test_init_params_fit_and_start_as_published(kind):
    config = tiny.CONFIGS[kind]
    params = decoder.init_params(config, jax.random.key(0), "bfloat16")
    shapes = {name: value.shape for name, value in params.items()}
    assert shapes == {n: v.shape for n, v in tiny.params(kind).items()}
    for name, value in params.items():
        is_float32 = name.endswith(("A_log", ".D", "dt_bias"))
        assert value.dtype == ("float32" if is_float32 else "bfloat16"), name
    layer = f"layers.{config.ssm_layers[0]}.{config.layer_types[-1]}"
    layer = layer if kind == "mamba2" else f"layers.{config.ssm_layers[0]}.mamba"
    np.testing.assert_array_equal(params[f"{layer}.D"], 1.0)
    dt = np.log1p(np.exp(np.asarray(params[f"{layer}.dt_bias"], np.float64)))
    assert 0.99e-3 < dt.min() < dt.max() < 0.101
    A = np.exp(np.asarray(params[f"{layer}.A_log"], np.float64))
    if kind == "mamba2":
        assert 1 <= A.min() < A.max() <= 16
    else:
        np.testing.assert_allclose(A, np.tile(np.arange(1, 9), (64, 1)), rtol=1e-6)
    assert np.asarray(params["final_norm.scale"] == 1).all()
    assert 0.015 < np.asarray(params["embed.embedding"], np.float32).std() < 0.025
    other = decoder.init_params(config, jax.random.key(1), "bfloat16")
    assert (
        params[f"{layer}.out_proj.kernel"] != other[f"{layer}.out_proj.kernel"]
    ).any()


def test_a_cache_that_is_just_long_enough():
    stepping.check_full_cache()
