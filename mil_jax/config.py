"""Typed, frozen descriptions of a model, and the bridge from `ml_collections`."""

import dataclasses
import math
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
        implementation: Of the scans over sequences; "auto" takes the fastest that runs here.
        attention: "auto" takes cuDNN on a GPU in bfloat16, else XLA.
        remat: Recompute each layer in the backward pass instead of storing its activations.
        remat_keeps: What is stored nevertheless: "products" (results of matrix products,
            kernels and attention, so that only cheap things are recomputed), or "nothing"
            (least memory, a whole forward pass more).
        scan_checkpoint_every: Steps between the states of a Mamba layer that its kernel keeps
            for the backward pass, 64, 4 or 2: fewer steps are faster and take N / 2 (4) or
            N (2) bytes a channel and token more while the layer's activations are stored.
        scan_layers: Scan over periods of equal layers (short compile times, for training);
            False unrolls them.
        layout: Of weights on the device: "train" has one array per tensor, "decode" lays
            them anew for reading them once a token: products of one input side by side,
            layers unrolled whatever `scan_layers` is. Names of `Params` are the same.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["auto", "pallas_triton", "xla_chunked", "reference"] = (
        "auto"
    )
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: bool = False
    remat_keeps: Literal["products", "nothing"] = "products"
    scan_checkpoint_every: Literal[64, 4, 2] = 64
    scan_layers: bool = True
    layout: Literal["train", "decode"] = "train"

    @property
    def is_scanned(self) -> bool:
        """Whether layers are stacked."""
        return self.scan_layers and self.layout == "train"

    @property
    def kernel(self) -> str | None:
        """The implementation as `pallas_kernels` takes it: a name, or None for auto."""
        return None if self.implementation == "auto" else self.implementation


@dataclasses.dataclass(frozen=True)
class ConversionConfig:
    """Which layers become state-space layers, and how they start (paper Sec. 2.3).

    Attributes:
        steps: One set of layers per conversion step, each holding the one before; stage
            distill trains after every step (stepwise distillation). One entry converts at
            once.
        mixer: Kind of the new layers.
        init_from: "attention", or "random" for the ablation.
        channel_order: See `surgery.attention_to_mamba`.
        dt_init: See `surgery.attention_to_mamba`.
        d_state: N of Mamba layers; Mamba-2 takes the head size.
    """

    steps: tuple[tuple[int, ...], ...]
    mixer: Literal["mamba", "mamba2"] = "mamba"
    init_from: Literal["attention", "random"] = "attention"
    channel_order: Literal["aligned", "original"] = "aligned"
    dt_init: Literal["mamba", "original"] = "mamba"
    d_state: int = 16

    def __post_init__(self) -> None:
        if self.d_state < 1:
            raise UserError(
                f"conversion.d_state is {self.d_state}; it must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from; each a spec of `mil_jax.data.sources`.

    Attributes:
        prompts: For pseudo-labels; answers in it are ignored.
        conversations: For sft, draft and pretrain.
        preferences: For dpo.
        evaluation: Held-out conversations.
        labels: Folder of records that stage pseudo_labels wrote, for distill and draft; ""
            takes those of the same workdir.
    """

    prompts: str = ""
    conversations: str = ""
    preferences: str = ""
    evaluation: str = ""
    labels: str = ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping and a schedule by name.

    Attributes:
        lr: Peak learning rate.
        schedule: After the linear warm-up: "cosine" or "linear" to `end_fraction` of the
            peak, or "constant".
        warmup_steps: Steps of linear warm-up.
        warmup_fraction: The same as a share of all steps; the larger of both counts.
        end_fraction: Last learning rate as a share of `lr`.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, on all trained weights.
        clip_norm: Most that the gradients' global norm may be; 0 does not clip.
    """

    lr: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    end_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Checks that no value turns a step round."""
        rates = ("lr", "warmup_steps", "warmup_fraction", "end_fraction")
        for name in (*rates, "eps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 "
                    "and finite"
                )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 "
                    "and below 1"
                )


StageName = Literal[
    "pretrain", "pseudo_labels", "distill", "sft", "dpo", "draft", "export", "evaluate"
]


_POSITIVE = (
    "batch_size",
    "accumulate",
    "length",
    "max_prompt_length",
    "epochs",
    "max_new_tokens",
    "loss_chunk",
    "checkpoint_every",
)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage as data. Fields that a kind of stage does not use are left at defaults.

    Attributes:
        name: Which stage.
        start_from: Folder or hub id of the model to start from; "" takes the stage before
            in the same workdir.
        optimizer: For stages that train.
        batch_size: Rows of a global step; of a generated batch in pseudo_labels.
        accumulate: Micro-batches per step; divides `batch_size`.
        length: Tokens of a row.
        max_prompt_length: dpo: prompts are cut to this many tokens, from the left.
        epochs: Passes over the data.
        max_steps: Ends earlier; 0 does not.
        packed: Several documents a row.
        trainable: "mamba" (the mixers), "not_mlp" (all but MLPs) or "all".
        ce_weight: alpha of Eq. 2.
        kl_weight: beta of Eq. 2; 0 needs no teacher.
        kl_reduction: See `losses.word_kd_loss`.
        dpo_beta: beta of Eq. 4.
        reference: dpo: "teacher", or "start" for the model that the stage starts from.
        draft_layers: draft: the layers that it keeps of the model it is cut from
            (`start_from`, or the teacher), in order; () keeps `draft_depth` of them.
        draft_depth: draft: number of layers to keep, evenly spaced from first to last.
        draft_vocab_size: draft: the commonest tokens of its records that it may propose;
            0 for all.
        target: draft: the model that it will speculate for, of the KL term; "" takes the
            one it is cut from.
        records: draft: "conversations", or "pseudo_labels" for what that stage wrote.
        max_new_tokens: pseudo_labels and evaluate: limit on an answer.
        temperature: pseudo_labels: 0 is greedy.
        top_k: pseudo_labels: 0 keeps all.
        top_p: pseudo_labels: 1 keeps all.
        loss_on: "answers", or "all" tokens but padding (pretrain).
        loss_chunk: Positions whose logits exist at a time.
        checkpoint_every: Steps between checkpoints.
    """

    name: StageName
    start_from: str = ""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    batch_size: int = 64
    accumulate: int = 1
    length: int = 2048
    max_prompt_length: int = 512
    epochs: int = 1
    max_steps: int = 0
    packed: bool = False
    trainable: Literal["mamba", "not_mlp", "all"] = "all"
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    kl_reduction: Literal["token_mean", "original"] = "token_mean"
    dpo_beta: float = 0.01
    reference: Literal["teacher", "start"] = "teacher"
    draft_layers: tuple[int, ...] = ()
    draft_depth: int = 0
    draft_vocab_size: int = 0
    target: str = ""
    records: Literal["conversations", "pseudo_labels"] = "conversations"
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    loss_on: Literal["answers", "all"] = "answers"
    loss_chunk: int = 512
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(
                    f"stage.{name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.max_steps < 0:
            raise UserError(
                f"stage.max_steps is {self.max_steps}; 0 runs through all the data"
            )
        for name in ("draft_depth", "draft_vocab_size", "ce_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"stage.{name} is {getattr(self, name)}; it must be at least 0"
                )
        if self.name in ("distill", "draft") and not (self.ce_weight or self.kl_weight):
            raise UserError(
                "stage.ce_weight and stage.kl_weight are both 0: nothing would be learnt"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"stage.accumulate ({self.accumulate}) does not divide stage.batch_size "
                f"({self.batch_size})"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; see `sharding.make_mesh`."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a command needs: what `configs/*.py` return, checked and frozen.

    Attributes:
        teacher: Hugging Face folder or hub id, or a model saved by a stage.
        conversion: How the student arises from the teacher.
        data: Where text comes from.
        stage: What to do.
        compute: How models run.
        mesh: On which devices.
        tokenizer: Folder or hub id; "" takes the teacher's.
        architecture: pretrain: the model to create.
        seed: Of initialisation, data order and sampling.
    """

    teacher: str
    conversion: ConversionConfig
    data: DataConfig
    stage: StageConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    tokenizer: str = ""
    architecture: ModelConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        steps = self.conversion.steps
        for i, (earlier, later) in enumerate(zip(steps, steps[1:], strict=False)):
            if not set(earlier) <= set(later):
                raise UserError(
                    f"conversion.steps[{i + 1}] must hold all layers of step {i}; "
                    f"missing {sorted(set(earlier) - set(later))}"
                )


def parse_arg(arg: str | None, **defaults: str | bool) -> dict[str, str | bool]:
    """Parses the text after the colon of `--config=file.py:key=value,flag`.

    Args:
        arg: Comma-separated `key=value`; a boolean may be given by its name alone.
        **defaults: Every key with its default, a string or a boolean.

    Raises:
        UserError: A key is unknown, a string has no value, or a boolean is neither true
            nor false.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, has_value, text = part.partition("=")
        if key not in defaults:
            raise UserError(
                f"unknown config argument {key!r}; known: {', '.join(defaults)}"
            )
        if isinstance(defaults[key], bool):
            if has_value and text not in ("true", "false"):
                raise UserError(f"config argument {key} is {text!r}; use true or false")
            values[key] = text == "true" if has_value else True
        elif not has_value:
            raise UserError(f"config argument {key} needs a value: {key}=...")
        else:
            values[key] = text
    return values
