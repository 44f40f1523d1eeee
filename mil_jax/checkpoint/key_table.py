"""Which released tensor holds which of our params, and how one becomes the other.

One table per layout serves import and export. A row maps one tensor of the file onto
one or several params; its transform is lossless in both directions. The layouts: the
Hugging Face Llama family, the hybrids published with the paper, and state-spaces Mamba.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import ml_dtypes
import numpy as np

from mil_jax.config import ModelConfig, SSMConfig
from mil_jax.errors import UserError

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A lossless pair of maps between a file tensor and our params.

    Attributes:
        file_shape: Shape in the file, from the shapes of the params.
        unpack: File tensor and param shapes to params; results may be views.
        pack: Params to the file tensor; the result may be a view.
    """

    file_shape: Callable[[Sequence[Shape]], Shape]
    unpack: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    pack: Callable[[Sequence[np.ndarray]], np.ndarray]


def _split_rows(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    ends = np.cumsum([shape[1] for shape in shapes])
    return [part.T for part in np.split(tensor, ends[:-1], axis=0)]


def _concat_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    rows = [part.T for part in parts]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=0)


IDENTITY = Transform(
    file_shape=lambda shapes: shapes[0],
    unpack=lambda tensor, _: [tensor],
    pack=lambda parts: parts[0],
)
# torch.nn.Linear: [out, in] in the file, [in, out] here. Several params are stacked
# along `out`, in their order in the row.
LINEAR = Transform(
    file_shape=lambda shapes: (sum(s[1] for s in shapes), shapes[0][0]),
    unpack=_split_rows,
    pack=_concat_rows,
)
# Depthwise torch.nn.Conv1d: [channels, 1, W] in the file, [W, channels] here.
CONV = Transform(
    file_shape=lambda shapes: (shapes[0][1], 1, shapes[0][0]),
    unpack=lambda tensor, _: [tensor[:, 0, :].T],
    pack=lambda parts: parts[0].T[:, None, :],
)
# The published Mamba hybrids add this bias twice, in the linear layer and in the scan;
# here it is added once. Both directions are exact in binary floating point (but for
# halves that fall below the smallest normal number).
ADDED_TWICE = Transform(
    file_shape=lambda shapes: shapes[0],
    unpack=lambda tensor, _: [tensor + tensor],
    pack=lambda parts: parts[0] * parts[0].dtype.type(0.5),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a file tensor, the params in it, and the transform."""

    key: str
    params: tuple[str, ...]
    transform: Transform = IDENTITY
    aliases: tuple[str, ...] = ()

    def under(self, key_prefix: str, param_prefix: str) -> "Row":
        """Returns the row of one layer."""
        return Row(
            key_prefix + self.key,
            tuple(param_prefix + name for name in self.params),
            self.transform,
            tuple(key_prefix + alias for alias in self.aliases),
        )


def _linear(key: str, *params: str) -> Row:
    return Row(f"{key}.weight", tuple(f"{p}.kernel" for p in params), LINEAR)


# Llama family. The hybrids share everything but the mixer.
_NORMS = (
    Row("input_layernorm.weight", ("input_norm.scale",)),
    Row("post_attention_layernorm.weight", ("mlp_norm.scale",)),
)
_MLP = tuple(
    _linear(f"mlp.{p}", f"mlp.{p}") for p in ("gate_proj", "up_proj", "down_proj")
)
_ATTENTION = tuple(
    _linear(f"self_attn.{p}", f"attn.{p}")
    for p in ("q_proj", "k_proj", "v_proj", "o_proj")
)
_ATTENTION_BIAS = tuple(
    Row(f"self_attn.{p}.bias", (f"attn.{p}.bias",))
    for p in ("q_proj", "k_proj", "v_proj")
)
_QK_NORM = tuple(
    Row(f"self_attn.{p}.weight", (f"attn.{p}.scale",)) for p in ("q_norm", "k_norm")
)
_CONV_AND_SSM = {
    kind: (
        Row("mamba.conv1d.weight", (f"{kind}.conv_kernel",), CONV),
        Row("mamba.conv1d.bias", (f"{kind}.conv_bias",)),
        Row("mamba.A_log", (f"{kind}.A_log",)),
        Row("mamba.D", (f"{kind}.D",)),
        _linear("mamba.out_proj", f"{kind}.out_proj"),
    )
    for kind in ("mamba", "mamba2")
}
_MAMBA = (
    _linear("mamba.in_proj_x", "mamba.x_proj"),
    _linear("mamba.in_proj_z", "mamba.z_proj"),
    _linear("mamba.B_proj", "mamba.B_proj"),
    _linear("mamba.C_proj", "mamba.C_proj"),
    _linear("mamba.dt_proj_down", "mamba.dt_down"),
    _linear("mamba.dt_proj", "mamba.dt_up"),
    Row("mamba.dt_proj.bias", ("mamba.dt_bias",), ADDED_TWICE),
    *_CONV_AND_SSM["mamba"],
)
_MAMBA2 = (
    _linear(
        "mamba.in_proj",
        *(f"mamba2.{p}" for p in ("z_proj", "x_proj", "B_proj", "C_proj", "dt_proj")),
    ),
    Row("mamba.dt_bias", ("mamba2.dt_bias",)),
    Row("mamba.norm.weight", ("mamba2.norm.scale",)),
    *_CONV_AND_SSM["mamba2"],
)
_MIXERS = {"attention": _ATTENTION, "mamba": _MAMBA, "mamba2": _MAMBA2}
_EMBEDDING = Row("model.embed_tokens.weight", ("embed.embedding",))
_FINAL_NORM = Row("model.norm.weight", ("final_norm.scale",))
_LM_HEAD = _linear("lm_head", "lm_head")

# Pure Mamba as published by state-spaces, and as transformers renames it.
_STATE_SPACES_LAYER = (
    Row("norm.weight", ("input_norm.scale",)),
    _linear("mixer.in_proj", "mamba.x_proj", "mamba.z_proj"),
    _linear("mixer.x_proj", "mamba.dt_down", "mamba.B_proj", "mamba.C_proj"),
    _linear("mixer.dt_proj", "mamba.dt_up"),
    Row("mixer.dt_proj.bias", ("mamba.dt_bias",)),
    *(
        dataclasses.replace(row, key=row.key.replace("mamba.", "mixer.", 1))
        for row in _CONV_AND_SSM["mamba"]
    ),
)
_STATE_SPACES_EMBEDDING = Row(
    "backbone.embedding.weight",
    ("embed.embedding",),
    aliases=("backbone.embeddings.weight",),
)
_STATE_SPACES_FINAL_NORM = Row("backbone.norm_f.weight", ("final_norm.scale",))


def table(config: ModelConfig) -> tuple[Row, ...]:
    """Returns every row of a model; together they hold each param exactly once."""
    pure = is_pure_mamba(config)
    rows = [_STATE_SPACES_EMBEDDING if pure else _EMBEDDING]
    prefix = "backbone.layers" if pure else "model.layers"
    for i in range(config.n_layers):
        layer = _STATE_SPACES_LAYER if pure else _layer_rows(config, i)
        rows += [row.under(f"{prefix}.{i}.", f"layers.{i}.") for row in layer]
    rows.append(_STATE_SPACES_FINAL_NORM if pure else _FINAL_NORM)
    if not config.tie_embeddings:
        rows.append(_LM_HEAD)
    return tuple(rows)


def is_pure_mamba(config: ModelConfig) -> bool:
    """Whether the model has the state-spaces layout (mixers only, no MLP)."""
    return config.ssm is not None and config.ssm.inputs_from == "conv"


def _layer_rows(config: ModelConfig, layer: int) -> tuple[Row, ...]:
    kind = config.layer_types[layer]
    rows = _NORMS + _MIXERS[kind] + _MLP
    if kind == "attention":
        rows += _ATTENTION_BIAS if config.attention_bias else ()
        rows += _QK_NORM if config.qk_norm else ()
    return rows


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the shape of every param of a model, keyed by its dotted name."""
    shapes: dict[str, Shape] = {
        "embed.embedding": (config.vocab_size, config.d_model),
        "final_norm.scale": (config.d_model,),
    }
    for i, kind in enumerate(config.layer_types):
        mixer = _MIXER_SHAPES[kind](config)
        layer = {"input_norm.scale": (config.d_model,), **mixer, **_mlp_shapes(config)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if not config.tie_embeddings:
        shapes["lm_head.kernel"] = (config.d_model, config.vocab_size)
    return shapes


def _mlp_shapes(config: ModelConfig) -> dict[str, Shape]:
    d_model, d_ff = config.d_model, config.d_ff
    if d_ff == 0:
        return {}
    return {
        "mlp_norm.scale": (d_model,),
        "mlp.gate_proj.kernel": (d_model, d_ff),
        "mlp.up_proj.kernel": (d_model, d_ff),
        "mlp.down_proj.kernel": (d_ff, d_model),
    }


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    q = config.n_heads * config.head_dim
    kv = config.n_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {}
    for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        shapes[f"attn.{name}.kernel"] = (config.d_model, out)
        if config.attention_bias:
            shapes[f"attn.{name}.bias"] = (out,)
    shapes["attn.o_proj.kernel"] = (q, config.d_model)
    if config.qk_norm:
        shapes |= {f"attn.{n}.scale": (config.head_dim,) for n in ("q_norm", "k_norm")}
    return shapes


def _mamba_shapes(config: ModelConfig) -> dict[str, Shape]:
    ssm = _ssm(config)
    d_inner, d_state, dt_rank = ssm.d_inner, ssm.d_state, ssm.dt_rank
    if ssm.inputs_from == "conv":
        dt_down, b, c = (d_inner, dt_rank), (d_inner, d_state), (d_inner, d_state)
    else:
        dt_down = (config.d_model, dt_rank)
        b, c = (config.d_model, ssm.d_xb), (config.d_model, d_inner)
    return {
        "mamba.x_proj.kernel": (config.d_model, ssm.d_xb),
        "mamba.z_proj.kernel": (config.d_model, d_inner),
        "mamba.B_proj.kernel": b,
        "mamba.C_proj.kernel": c,
        "mamba.dt_down.kernel": dt_down,
        "mamba.dt_up.kernel": (dt_rank, d_inner),
        "mamba.dt_bias": (d_inner,),
        "mamba.conv_kernel": (ssm.d_conv, d_inner),
        "mamba.conv_bias": (d_inner,),
        "mamba.A_log": (d_inner, d_state),
        "mamba.D": (d_inner,),
        "mamba.out_proj.kernel": (d_inner, config.d_model),
    }


def _mamba2_shapes(config: ModelConfig) -> dict[str, Shape]:
    ssm = _ssm(config)
    d_model, d_inner, n_heads = config.d_model, ssm.d_inner, ssm.d_inner // ssm.d_state
    channels = 2 * ssm.d_xb + d_inner
    return {
        "mamba2.z_proj.kernel": (d_model, d_inner),
        "mamba2.x_proj.kernel": (d_model, ssm.d_xb),
        "mamba2.B_proj.kernel": (d_model, ssm.d_xb),
        "mamba2.C_proj.kernel": (d_model, d_inner),
        "mamba2.dt_proj.kernel": (d_model, n_heads),
        "mamba2.dt_bias": (n_heads,),
        "mamba2.norm.scale": (d_inner,),
        "mamba2.conv_kernel": (ssm.d_conv, channels),
        "mamba2.conv_bias": (channels,),
        "mamba2.A_log": (n_heads,),
        "mamba2.D": (n_heads,),
        "mamba2.out_proj.kernel": (d_inner, d_model),
    }


_MIXER_SHAPES: dict[str, Callable[[ModelConfig], dict[str, Shape]]] = {
    "attention": _attention_shapes,
    "mamba": _mamba_shapes,
    "mamba2": _mamba2_shapes,
}


def _ssm(config: ModelConfig) -> SSMConfig:
    if config.ssm is None:
        raise UserError("the model has Mamba layers but its config has no `ssm`")
    return config.ssm


FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def as_float_dtype(dtype: object) -> np.dtype:
    """Returns float32, bfloat16 or float16; any other dtype is refused."""
    try:
        found = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOAT_DTYPES:
        raise UserError(f"dtype {dtype} is not supported; use one of {FLOAT_DTYPES}")
    return found


def stored_dtype(name: str, own: np.dtype, requested: np.dtype | None) -> np.dtype:
    """Returns the dtype a param gets: its own, or the requested one if there is one.

    `A_log` and `D` then go to float32 whatever is requested: the scan's decay is an
    exponential of an exponential of `A_log`, and both tensors are small.
    """
    if requested is None:
        return own
    return np.dtype(np.float32) if name.endswith((".A_log", ".D")) else requested


def converted(name: str, value: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Returns `value` in its `stored_dtype`; the same array if it has that already."""
    return value.astype(stored_dtype(name, value.dtype, dtype), copy=False)
