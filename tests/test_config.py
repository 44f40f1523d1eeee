"""Unit tests of typed configs: every wrong key and type is named."""

import dataclasses
import json
from typing import Literal

import ml_collections
import pytest

from configs import base, tiny
from mil_jax.config import (
    ComputeConfig,
    ConversionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
    SSMConfig,
    StageConfig,
    from_config_dict,
    model_config_from_dict,
    model_config_to_dict,
    parse_arg,
)
from mil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float = 0.5
    count: int = 1
    on: bool = False
    text: str = ""
    kind: Literal["a", "b"] = "a"
    numbers: tuple[int, ...] = ()
    nested: tuple[tuple[int, ...], ...] = ()
    maybe: int | None = None
    maybe_inner: Inner | None = None


def _outer(**values):
    return from_config_dict(Outer, {"inner": {"size": 3}} | values)


class TestFromConfigDict:
    def test_defaults_and_nesting(self):
        assert _outer() == Outer(Inner(3))
        assert _outer(maybe_inner={"size": 4, "name": "y"}).maybe_inner == Inner(4, "y")
        assert _outer(inner=Inner(5)).inner == Inner(5)

    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("rate", 2, 2.0),
            ("numbers", [1, 2], (1, 2)),
            ("nested", [[1], (2, 3)], ((1,), (2, 3))),
            ("maybe", None, None),
            ("maybe", 3, 3),
            ("maybe_inner", None, None),
            ("on", True, True),
        ],
    )
    def test_accepted(self, key, value, expected):
        found = getattr(_outer(**{key: value}), key)
        assert found == expected and type(found) is type(expected)

    @pytest.mark.parametrize(
        ("key", "value", "path", "expected"),
        [
            ("count", True, "count", "int"),
            ("count", 1.0, "count", "int"),
            ("count", "1", "count", "int"),
            ("count", None, "count", "int"),
            ("maybe", True, "maybe", "int"),
            ("maybe", "3", "maybe", "int"),
            ("rate", "0.5", "rate", "float"),
            ("rate", True, "rate", "float"),
            ("on", 1, "on", "bool"),
            ("on", "true", "on", "bool"),
            ("text", 3, "text", "str"),
            ("numbers", "12", "numbers", "a tuple"),
            ("numbers", 1, "numbers", "a tuple"),
            ("numbers", [1, "2"], "numbers[1]", "int"),
            ("numbers", [True], "numbers[0]", "int"),
            ("nested", [1], "nested[0]", "a tuple"),
            ("nested", [[1], ["a"]], "nested[1][0]", "int"),
            ("inner", 3, "inner", "a mapping of Inner"),
            ("inner", None, "inner", "a mapping of Inner"),
            ("inner", {"size": "3"}, "inner.size", "int"),
            ("maybe_inner", [1], "maybe_inner", "a mapping of Inner"),
        ],
    )
    def test_wrong_types_are_named(self, key, value, path, expected):
        with pytest.raises(UserError) as error:
            _outer(**{key: value})
        message = str(error.value)
        assert message.startswith(f"config key {path} is ")
        assert message.endswith(f"; expected {expected}")

    @pytest.mark.parametrize("value", ["c", "A", 1, None, True])
    def test_wrong_literals(self, value):
        with pytest.raises(
            UserError, match=r"key kind is .*; expected one of \('a', 'b'"
        ):
            _outer(kind=value)

    def test_unknown_keys(self):
        with pytest.raises(
            UserError, match="unknown config key nope; known keys of Out"
        ):
            _outer(nope=1)
        with pytest.raises(UserError) as error:
            _outer(inner={"size": 3, "sise": 4})
        assert str(error.value) == (
            "unknown config key inner.sise; known keys of inner: size, name"
        )

    def test_missing_keys(self):
        with pytest.raises(UserError, match="config key inner is missing"):
            from_config_dict(Outer, {})
        with pytest.raises(UserError, match="config key inner.size is missing"):
            _outer(inner={})

    def test_config_dicts_are_read(self):
        values = ml_collections.ConfigDict({"inner": {"size": 3}, "numbers": (1, 2)})
        assert from_config_dict(Outer, values) == Outer(Inner(3), numbers=(1, 2))

    def test_a_run_survives_the_way_through_flags(self):
        values = tiny.get_config("stage=distill")
        config = from_config_dict(RunConfig, values)
        assert base.to_config_dict(config) == values
        assert from_config_dict(RunConfig, values.to_dict()) == config


class TestModelConfig:
    CONFIG = ModelConfig(
        vocab_size=9,
        d_model=8,
        layer_types=("attention", "mamba"),
        n_heads=4,
        n_kv_heads=2,
        head_dim=2,
        d_ff=16,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
        sliding_window=5,
        tie_embeddings=True,
        ssm=SSMConfig(d_state=2, dt_rank=1, d_inner=8, d_xb=4),
        eos_token_ids=(1, 2),
    )

    def test_through_json(self):
        text = json.dumps(model_config_to_dict(self.CONFIG))
        assert model_config_from_dict(json.loads(text)) == self.CONFIG

    def test_layers(self):
        assert self.CONFIG.n_layers == 2
        assert self.CONFIG.ssm_layers == (1,)
        assert self.CONFIG.is_hybrid

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_types": ("attention", "conv")}, r"layer_types\[1\] is 'conv'"),
            ({"ssm": None}, "names Mamba layers but `ssm` is not set"),
            ({"n_heads": 0}, "need n_heads, n_kv_heads and head_dim > 0"),
            ({"head_dim": 0}, "need n_heads, n_kv_heads and head_dim > 0"),
            ({"n_kv_heads": 3}, r"n_heads \(4\) is not a multiple of n_kv_heads \(3\)"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(self.CONFIG, **changes)

    def test_pure_mamba_needs_no_heads(self):
        dataclasses.replace(
            self.CONFIG, layer_types=("mamba",), n_heads=0, n_kv_heads=0, head_dim=0
        )

    def test_other_rope_scaling(self):
        with pytest.raises(UserError, match="type 'yarn' is not supported"):
            RopeScaling(8.0, 1.0, 4.0, 32, rope_type="yarn")


def _run(stage=None, steps=()):
    return RunConfig(
        teacher="",
        conversion=ConversionConfig(steps=steps),
        data=DataConfig(),
        stage=stage or StageConfig(name="sft"),
    )


class TestRunConfig:
    def test_steps_must_be_nested(self):
        _run(steps=((0,), (2, 0), (0, 1, 2)))
        with pytest.raises(UserError) as error:
            _run(steps=((0, 2, 5), (0, 2, 5), (0, 1)))
        assert str(error.value) == (
            "conversion.steps[2] must hold all layers of step 1; missing [2, 5]"
        )

    @pytest.mark.parametrize(
        "key", ["draft_depth", "draft_vocab_size", "ce_weight", "kl_weight"]
    )
    def test_counts_and_weights_are_not_negative(self, key):
        with pytest.raises(
            UserError, match=f"stage.{key} is -1; it must be at least 0"
        ):
            StageConfig(name="draft", **{key: -1})

    @pytest.mark.parametrize("name", ["distill", "draft"])
    def test_something_is_learnt(self, name):
        StageConfig(name=name, ce_weight=0.0, kl_weight=1.0)
        with pytest.raises(UserError, match="both 0: nothing would be learnt"):
            StageConfig(name=name, ce_weight=0.0)

    def test_accumulate_must_divide(self):
        StageConfig(name="sft", batch_size=6, accumulate=3)
        with pytest.raises(
            UserError, match=r"accumulate \(4\) does not divide .* \(6\)"
        ):
            StageConfig(name="sft", batch_size=6, accumulate=4)

    @pytest.mark.parametrize(
        "key",
        [
            "batch_size",
            "accumulate",
            "length",
            "max_prompt_length",
            "epochs",
            "max_new_tokens",
            "loss_chunk",
            "checkpoint_every",
        ],
    )
    @pytest.mark.parametrize("value", [0, -1])
    def test_sizes_are_positive(self, key, value):
        with pytest.raises(UserError, match=f"stage.{key} is {value}; it must be at"):
            StageConfig(name="sft", **{key: value})

    def test_no_number_of_steps_below_zero(self):
        with pytest.raises(UserError, match="stage.max_steps is -1; 0 runs through"):
            StageConfig(name="sft", max_steps=-1)

    @pytest.mark.parametrize("key", ["lr", "clip_norm", "warmup_fraction"])
    def test_no_optimizer_that_climbs(self, key):
        values = {"lr": 1e-3} | {key: -1.0}
        with pytest.raises(UserError, match=f"optimizer.{key} is -1.0; it must be at"):
            OptimizerConfig(**values)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("lr", float("nan"), "lr is nan; it must be at least 0 and finite"),
            ("lr", float("inf"), "lr is inf; it must be at least 0 and finite"),
            ("b2", 1.0, "b2 is 1.0; it must be at least 0 and below 1"),
            ("b1", -0.1, "b1 is -0.1; it must be at least 0 and below 1"),
        ],
    )
    def test_no_optimizer_that_leaves_the_numbers(self, key, value, message):
        with pytest.raises(UserError, match=f"optimizer.{message}"):
            OptimizerConfig(**({"lr": 1e-3} | {key: value}))

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seeds_that_no_generator_takes(self, seed):
        kwargs = {
            "teacher": "",
            "conversion": ConversionConfig(()),
            "data": DataConfig(),
            "stage": StageConfig(name="sft"),
        }
        assert RunConfig(**kwargs, seed=2**32 - 1).seed == 2**32 - 1
        with pytest.raises(
            UserError, match=f"seed is {seed}; it must be from 0 to 4294"
        ):
            RunConfig(**kwargs, seed=seed)

    def test_no_state_of_nothing(self):
        with pytest.raises(UserError, match="conversion.d_state is 0; it must be at"):
            ConversionConfig((), d_state=0)

    def test_kernel_of_auto_is_none(self):
        assert ComputeConfig().kernel is None
        assert ComputeConfig(implementation="xla_chunked").kernel == "xla_chunked"


class TestParseArg:
    DEFAULTS = {"stage": "distill", "mixer": "mamba", "small": False, "big": True}

    def _parse(self, arg):
        return parse_arg(arg, **self.DEFAULTS)

    @pytest.mark.parametrize("arg", [None, "", ","])
    def test_defaults(self, arg):
        assert self._parse(arg) == self.DEFAULTS

    def test_values(self):
        assert self._parse("stage=sft,small,big=false") == {
            "stage": "sft",
            "mixer": "mamba",
            "small": True,
            "big": False,
        }
        assert self._parse("mixer=a=b")["mixer"] == "a=b"

    def test_unknown(self):
        with pytest.raises(
            UserError, match="argument 'nope'; known: stage, mixer, small"
        ):
            self._parse("stage=sft,nope=1")

    @pytest.mark.parametrize("text", ["1", "True", ""])
    def test_bad_boolean(self, text):
        with pytest.raises(UserError, match=f"small is '{text}'; use true or false"):
            self._parse(f"small={text}")

    def test_text_without_value(self):
        with pytest.raises(UserError, match="argument stage needs a value"):
            self._parse("stage")
