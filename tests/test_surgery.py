import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from checks import conversion, tiny
from checks.conversion import convert, teacher

from mil_jax import surgery
from mil_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.mark.parametrize(
    ("mixer", "order"),
    [
        ("mamba", "aligned"),
        ("mamba", "original"),
        ("mamba2", "aligned"),
        ("mamba2", "original"),
    ],
)
def test_weights_land_where_they_belong(mixer, order):
    conversion.check_copies(mixer, order)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_aligned_channels_are_linear_attention(mixer):
    conversion.check_aligned(mixer)


def test_original_channels_are_not():
    assert conversion.alignment_error(channel_order="original") > 0.1


@pytest.mark.parametrize(
    "sizes", [{"d_state": 16}, {"n_kv_heads": 4}, {"n_heads": 2}, {"n_kv_heads": 1}]
)
def test_orders_agree_with_one_block_or_without_groups(sizes):
    is_same = sizes != {"n_kv_heads": 1}
    assert conversion.alignment_error(**sizes) < 1e-5
    error = conversion.alignment_error(channel_order="original", **sizes)
    assert (error < 1e-5) == is_same


def test_stepwise_conversion():
    conversion.check_stepwise()


def test_start_of_dt():
    conversion.check_dt_init()


def test_random_start_copies_nothing():
    params, config = teacher()
    copied, _ = convert(params, config, (1,))
    drawn, _ = convert(params, config, (1,), init_from="random")
    differing = {name for name in copied if (copied[name] != drawn[name]).any()}
    names = ("x_proj", "B_proj", "C_proj", "out_proj")
    assert differing == {f"layers.1.mamba.{name}.kernel" for name in names}
    assert all(np.isfinite(value).all() for value in drawn.values())


def test_seed_decides_what_attention_does_not_give():
    params, config = teacher()
    first, second, again = (
        convert(params, config, (1, 2), seed=seed)[0] for seed in (0, 1, 0)
    )
    name = "layers.1.mamba.z_proj.kernel"
    np.testing.assert_array_equal(first[name], again[name])
    assert (first[name] != second[name]).all()
    assert (first[name] != first["layers.2.mamba.z_proj.kernel"]).all()


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_new_weights_have_the_teachers_dtype_but_for_the_recurrences(mixer):
    params, config = teacher()
    halves = {n: np.asarray(jnp.asarray(v, jnp.bfloat16)) for n, v in params.items()}
    result, _ = convert(halves, config, (1,), mixer=mixer)
    for name, value in result.items():
        is_float32 = name.endswith(("A_log", ".D", "dt_bias"))
        assert value.dtype == (np.float32 if is_float32 else jnp.bfloat16), name
    on_device, _ = convert(
        {n: jnp.asarray(v) for n, v in params.items()}, config, (1,), mixer=mixer
    )
    on_host, _ = convert(params, config, (1,), mixer=mixer)
    for name, value in on_host.items():
        np.testing.assert_array_equal(on_device[name], value)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_sizes(mixer):
    params, config = teacher()
    _, hybrid = convert(params, config, (0,), mixer=mixer)
    ssm = hybrid.ssm
    assert (ssm.d_inner, ssm.d_xb, ssm.dt_rank, ssm.d_conv) == (64, 32, 2, 4)
    assert ssm.d_state == (8 if mixer == "mamba" else 16)
    assert ssm.inputs_from == "hidden"
    assert (
        dataclasses.replace(hybrid, ssm=None, layer_types=config.layer_types) == config
    )


def test_inputs_are_not_changed():
    params, config = teacher()
    before = {name: value.copy() for name, value in params.items()}
    for value in params.values():
        value.flags.writeable = False
    result, hybrid = convert(params, config, (0, 1))
    surgery.keep_layers(result, hybrid, (1,))
    assert set(params) == set(before)
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value)
    same, unchanged = convert(params, config, ())
    assert unchanged == config
    assert same is not params
    assert set(same) == set(params)


def test_keep_layers():
    conversion.check_keep_layers()


QWEN2 = {"attention_bias": True, "model_type": "qwen2"}
QWEN3 = {"qk_norm": True, "model_type": "qwen3"}


@pytest.mark.parametrize(
    ("changes", "layers", "kwargs", "message"),
    [
        ({}, (0, 4), {}, "holds 4, but the model has layers 0 to 3"),
        ({}, (-1,), {}, "holds -1"),
        ({}, (1, 2, 1), {}, r"\(1, 2, 1\) names a layer twice"),
        ({}, (0,), {"d_state": 5}, "d_state 5 does not divide .* head_dim 16"),
        ({}, (0,), {"d_state": 32}, "d_state 32 does not divide"),
        ({}, (0,), {"mixer": "rnn"}, "mixer is 'rnn'"),
        (QWEN2, (0,), {}, "qwen2 teacher has biases"),
        (QWEN3, (0,), {}, "qwen3 teacher has norms"),
    ],
)
def test_what_cannot_be_converted_is_refused(changes, layers, kwargs, message):
    params, config = teacher(**changes)
    with pytest.raises(UserError, match=message):
        convert(params, config, layers, **kwargs)


def test_no_way_back_and_no_second_kind():
    params, config = convert(*teacher(), (0, 2))
    with pytest.raises(UserError, match=r"layer 2 is a state-space layer already"):
        convert(params, config, (0, 1))
    with pytest.raises(UserError, match="the hybrid has mamba layers; new mamba2"):
        convert(params, config, (0, 1, 2), mixer="mamba2")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "is empty"),
        ((1, 1), "names a layer twice"),
        ((4,), "holds 4, but the model has layers 0 to 3"),
        ((-1,), "holds -1"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused(layers, message):
    params, config = teacher()
    with pytest.raises(UserError, match=message):
        surgery.keep_layers(params, config, layers)


def test_a_draft_answers_like_the_layers_it_kept():
    params, config = teacher()
    kept, small = surgery.keep_layers(params, config, (0, 1))
    tokens = tiny.tokens(2, 14)
    expected = tiny.forward(tiny.model("attention"), tokens)
    actual = tiny.forward(tiny.build(small, kept), tokens)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("n_layers", "depth", "expected"),
    [
        (32, 1, (0,)),
        (32, 2, (0, 31)),
        (32, 4, (0, 10, 20, 31)),
        (5, 4, (0, 1, 2, 4)),
        (3, 3, (0, 1, 2)),
    ],
)
def test_evenly_spaced_layers(n_layers, depth, expected):
    assert surgery.spaced_layers(n_layers, depth) == expected


@pytest.mark.parametrize("depth", [0, -1, 5])
def test_more_layers_than_there_are(depth):
    with pytest.raises(UserError, match=f"draft_depth is {depth}, but the model has 4"):
        surgery.spaced_layers(4, depth)


@pytest.mark.parametrize("layers", [(1,), (2, 1)])
def test_a_draft_of_attention_has_no_sizes_of_mamba(layers):
    params, config = convert(*teacher(), (0, 2))
    kept, small = surgery.keep_layers(params, config, layers)
    assert small.ssm == (config.ssm if 2 in layers else None)
    assert any(".mamba." in name for name in kept) == (2 in layers)
