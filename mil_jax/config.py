"""Typed, frozen descriptions of a model, and the bridge from `ml_collections`."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from mil_jax.errors import UserError

LayerType = Literal["attention", "mamba", "mamba2"]
LAYER_TYPES: tuple[LayerType, ...] = typing.get_args(LayerType)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 (the `llama3` rule of `rope_scaling`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        if self.rope_type != "llama3":
            raise UserError(
                f"rope_scaling of type {self.rope_type!r} is not supported; "
                "supported: none, 'default' or 'llama3'"
            )


@dataclasses.dataclass(frozen=True)
class SSMConfig:
    """Sizes shared by all Mamba layers of a model.

    Attributes:
        d_state: N, state size per channel (Mamba) or per head row (Mamba-2).
        dt_rank: R, rank of the step-size projection (Mamba only; Mamba-2 has none).
        d_inner: E, channels of the state-space model.
        d_xb: X, channels of x and B before the grouped-query expansion.
        d_conv: W, taps of the causal depthwise convolution.
        inputs_from: Where dt, B and C are read: "hidden" (hybrids: the layer's input) or
            "conv" (pure Mamba: the convolution's output).
    """

    d_state: int
    dt_rank: int
    d_inner: int
    d_xb: int
    d_conv: int = 4
    inputs_from: Literal["hidden", "conv"] = "hidden"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder whose layers mix with attention, Mamba or Mamba-2.

    `layer_types` has one entry per layer. `d_ff == 0` means that layers have no MLP (pure
    Mamba). `ssm` is required as soon as one layer is not attention.
    """

    vocab_size: int
    d_model: int
    layer_types: tuple[LayerType, ...]
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    d_ff: int = 0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 8192
    ssm: SSMConfig | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for i, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise UserError(
                    f"layer_types[{i}] is {kind!r}; expected one of {LAYER_TYPES}"
                )
        if self.ssm_layers and self.ssm is None:
            raise UserError("layer_types names Mamba layers but `ssm` is not set")
        if len(self.ssm_layers) < self.n_layers:
            if not (self.n_heads and self.n_kv_heads and self.head_dim):
                raise UserError(
                    "attention layers need n_heads, n_kv_heads and head_dim > 0"
                )
            if self.n_heads % self.n_kv_heads:
                raise UserError(
                    f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads "
                    f"({self.n_kv_heads})"
                )

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    @property
    def ssm_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose mixer is Mamba or Mamba-2."""
        return tuple(i for i, k in enumerate(self.layer_types) if k != "attention")

    @property
    def is_hybrid(self) -> bool:
        """Whether any layer is a state-space layer."""
        return bool(self.ssm_layers)


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Returns plain JSON types; `model_config_from_dict` is the inverse."""
    return dataclasses.asdict(config)


def model_config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Rebuilds a `ModelConfig`; unknown keys and wrong types raise `UserError`."""
    return from_config_dict(ModelConfig, values)


def from_config_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Turns nested mappings into the frozen dataclass `cls`, checking keys and types.

    Every key of `values` must be a field of `cls` and every field without a default must be
    present, so that a key nobody reads cannot hide in a config.

    Args:
        cls: A dataclass whose fields are ints, floats, bools, strings, tuples, literals,
            optionals of those, or such dataclasses again.
        values: A `ConfigDict`, dict or parsed JSON object.
        path: Dotted prefix for messages.

    Raises:
        UserError: A key is unknown or missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    where = path or cls.__name__
    for key in values:
        if key not in fields:
            raise UserError(
                f"unknown config key {path + '.' if path else ''}{key}; "
                f"known keys of {where}: {', '.join(fields)}"
            )
    kwargs = {}
    for name, field in fields.items():
        dotted = f"{path}.{name}" if path else name
        if name in values:
            kwargs[name] = _convert(hints[name], values[name], dotted)
        elif (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"config key {dotted} is missing")
    return cls(**kwargs)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as the annotated type or raises `UserError` naming `path`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _convert(inner, value, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"config key {path} is {value!r}; expected one of {args}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise _wrong_type(path, value, "a tuple")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise _wrong_type(path, value, f"a mapping of {hint.__name__}")
        return from_config_dict(hint, dict(value.items()), path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong_type(path, value, hint.__name__)
    return value


def _wrong_type(path: str, value: Any, expected: str) -> UserError:
    return UserError(
        f"config key {path} is {value!r} ({type(value).__name__}); expected {expected}"
    )


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model runs; never part of a checkpoint.

    Attributes:
        dtype: Matrix products and activations. SSM state, decay, norms' statistics, softmax
            and logits are float32 whatever it is.
        param_dtype: Storage of weights that are not trained in float32 by a stage.
        implementation: Of the state-space kernels; None takes the fastest that runs here.
        attention: "xla" or "cudnn"; None takes cuDNN on a GPU in bfloat16, else XLA.
        remat: Recompute each layer in the backward pass instead of storing its activations.
        scan_layers: Scan over periods of equal layers (short compile times, for training);
            False unrolls them (fast decoding).
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: str | None = None
    attention: Literal["xla", "cudnn"] | None = None
    remat: bool = False
    scan_layers: bool = True
