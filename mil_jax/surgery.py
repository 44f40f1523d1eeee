"""Replaces attention layers by Mamba layers that start from them (paper Sec. 2.3, Alg. 1).

A tree goes in and a tree comes out; nothing runs on an accelerator.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mil_jax.array_types import ArrayLike, Params
from mil_jax.config import ModelConfig, SSMConfig
from mil_jax.errors import UserError
from mil_jax.models.decoder import init_layer

ChannelOrder = Literal["aligned", "original"]
DtInit = Literal["mamba", "original"]

# Which attention projection starts which state-space projection (paper Alg. 1).
ATTENTION_TO_SSM = {
    "v_proj": "x_proj",
    "k_proj": "B_proj",
    "q_proj": "C_proj",
    "o_proj": "out_proj",
}


def attention_to_mamba(
    params: Params,
    config: ModelConfig,
    ssm_layers: Sequence[int],
    *,
    mixer: Literal["mamba", "mamba2"] = "mamba",
    init_from: Literal["attention", "random"] = "attention",
    channel_order: ChannelOrder = "aligned",
    dt_init: DtInit = "mamba",
    d_state: int = 16,
    seed: int = 0,
) -> tuple[Params, ModelConfig]:
    """Returns a hybrid whose `ssm_layers` are state-space layers.

    Args:
        params: A teacher's or an earlier hybrid's weights; not changed.
        config: Their architecture.
        ssm_layers: Every layer that shall be a state-space layer. Those that are one already
            stay as they are, so that stepwise conversion passes growing sets.
        mixer: Kind of the new layers.
        init_from: "attention" copies W_V, W_K, W_Q, W_O into x, B, C and out; "random" draws
            them afresh (the paper's ablation).
        channel_order: Of Mamba's E channels under grouped-query attention. "aligned" makes
            every query channel meet the key channels it met in attention; "original" keeps
            the published implementation's pairing. Same function if N = P or H = K.
        dt_init: "mamba" starts dt_bias as Mamba does; "original" doubles it, as the published
            implementation in effect does (Mamba only).
        d_state: N of new Mamba layers; Mamba-2 takes N = head_dim.
        seed: Of the weights that attention does not give.

    Returns:
        New parameters, in the dtype of `params`, and the new architecture.

    Raises:
        UserError: A layer index is out of range or given twice, a state-space layer would
            turn back into attention, or sizes do not fit.
    """
    chosen = check_layers(config, ssm_layers)
    ssm = _ssm_config(config, mixer, d_state)
    kinds = list(config.layer_types)
    new = [i for i in chosen if kinds[i] == "attention"]
    for i in new:
        kinds[i] = mixer
    if not new:
        return dict(params), config
    hybrid = dataclasses.replace(config, layer_types=tuple(kinds), ssm=ssm)
    _check_convertible(config)
    result = {
        name: value
        for name, value in params.items()
        if not any(name.startswith(f"layers.{i}.attn.") for i in new)
    }
    dtype = params["final_norm.scale"].dtype
    for i in new:
        fresh = _fresh_mixer(hybrid, mixer, jax.random.key(seed), i)
        if dt_init == "original" and mixer == "mamba":
            fresh["dt_bias"] = 2 * fresh["dt_bias"]
        if init_from == "attention":
            source = {
                theirs: params[f"layers.{i}.attn.{ours}.kernel"]
                for ours, theirs in ATTENTION_TO_SSM.items()
            }
            if mixer == "mamba" and channel_order == "aligned":
                order = aligned_channels(config, ssm.d_state)
                source["C_proj"] = source["C_proj"][:, order]
                source["out_proj"] = source["out_proj"][order, :]
            fresh |= {f"{name}.kernel": kernel for name, kernel in source.items()}
        for name, value in fresh.items():
            is_float32 = name in ("A_log", "D", "dt_bias")
            target = np.float32 if is_float32 else dtype
            result[f"layers.{i}.{mixer}.{name}"] = _cast(value, target)
    return result, hybrid


def aligned_channels(config: ModelConfig, d_state: int) -> np.ndarray:
    """Returns, for each Mamba channel, the attention channel that starts it.

    Mamba's grouped-query expansion repeats blocks of N channels, attention's repeats heads of
    P. Ordering channels by (kv head, block, repeat, i) instead of (kv head, repeat, block, i)
    gives each query block the key block of its own head.
    """
    repeats = config.n_heads // config.n_kv_heads
    blocks = config.head_dim // d_state
    channels = np.arange(config.n_heads * config.head_dim)
    by_head = channels.reshape(config.n_kv_heads, repeats, blocks, d_state)
    return by_head.transpose(0, 2, 1, 3).reshape(-1)


def check_layers(config: ModelConfig, ssm_layers: Sequence[int]) -> list[int]:
    """Returns the layers to convert, sorted.

    Raises:
        UserError: A layer is out of range, named twice, or would be attention again.
    """
    for i in ssm_layers:
        if not 0 <= i < config.n_layers:
            raise UserError(
                f"ssm_layers holds {i}, but the model has layers 0 to "
                f"{config.n_layers - 1}"
            )
    if len(set(ssm_layers)) < len(ssm_layers):
        raise UserError(f"ssm_layers {tuple(ssm_layers)} names a layer twice")
    if lost := sorted(set(config.ssm_layers) - set(ssm_layers)):
        raise UserError(
            f"layer {lost[0]} is a state-space layer already and cannot become attention "
            f"again; add {lost} to ssm_layers"
        )
    return sorted(ssm_layers)


def _ssm_config(config: ModelConfig, mixer: str, d_state: int) -> SSMConfig:
    if mixer not in ("mamba", "mamba2"):
        raise UserError(f"mixer is {mixer!r}; expected 'mamba' or 'mamba2'")
    if config.ssm is not None:
        old = {config.layer_types[i] for i in config.ssm_layers}
        if old != {mixer}:
            raise UserError(
                f"the hybrid has {', '.join(sorted(old))} layers; new {mixer} layers "
                "beside them are not supported: set mixer to the same kind"
            )
        return config.ssm
    state = config.head_dim if mixer == "mamba2" else d_state
    if state < 1 or config.head_dim % state:
        raise UserError(
            f"d_state {state} does not divide the teacher's head_dim {config.head_dim}"
        )
    return SSMConfig(
        d_state=state,
        dt_rank=math.ceil(config.d_model / 16),
        d_inner=config.n_heads * config.head_dim,
        d_xb=config.n_kv_heads * config.head_dim,
    )


def _check_convertible(config: ModelConfig) -> None:
    if config.attention_bias or config.qk_norm:
        what = "biases on q, k, v" if config.attention_bias else "norms on q and k"
        raise UserError(
            f"a {config.model_type} teacher has {what}, which a Mamba layer has no place "
            "for; convert a Llama or Mistral teacher"
        )


def _fresh_mixer(
    config: ModelConfig, mixer: str, key: jax.Array, layer: int
) -> dict[str, ArrayLike]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        whole = init_layer(config, mixer, jax.random.fold_in(key, layer))
        prefix = f"{mixer}."
        return {
            name.removeprefix(prefix): np.asarray(value)
            for name, value in whole.items()
            if name.startswith(prefix)
        }


def _cast(value: ArrayLike, dtype: np.dtype) -> ArrayLike:
    if isinstance(value, jax.Array):
        return value.astype(jnp.dtype(dtype))
    return np.asarray(value, dtype)


def spaced_layers(n_layers: int, depth: int) -> tuple[int, ...]:
    """Returns `depth` of a model's layers, evenly spaced from the first to the last.

    Of 32 layers, 2 are (0, 31) and 4 are (0, 10, 20, 31), as in the paper; 1 is (0,).

    Raises:
        UserError: The model has fewer layers, or none is asked for.
    """
    if not 1 <= depth <= n_layers:
        raise UserError(
            f"stage.draft_depth is {depth}, but the model has {n_layers} layers; keep 1 "
            f"to {n_layers} of them, or name them in stage.draft_layers"
        )
    return tuple(i * (n_layers - 1) // max(depth - 1, 1) for i in range(depth))


def keep_layers(
    params: Params, config: ModelConfig, layers: Sequence[int]
) -> tuple[Params, ModelConfig]:
    """Returns the model that has only `layers`, in that order ("shrink", Sec. 4.3).

    Embedding, final norm and language-model head stay; the result is the start of a draft.

    Raises:
        UserError: No layer is named, or one is out of range or named twice.
    """
    if not layers:
        raise UserError("stage.draft_layers is empty; name the layers the draft keeps")
    if len(set(layers)) < len(layers):
        raise UserError(f"stage.draft_layers {tuple(layers)} names a layer twice")
    for i in layers:
        if not 0 <= i < config.n_layers:
            raise UserError(
                f"stage.draft_layers holds {i}, but the model has layers 0 to "
                f"{config.n_layers - 1}"
            )
    new_index = {str(old): new for new, old in enumerate(layers)}
    kept: Params = {}
    for name, value in params.items():
        if not name.startswith("layers."):
            kept[name] = value
            continue
        _, index, rest = name.split(".", 2)
        if index in new_index:
            kept[f"layers.{new_index[index]}.{rest}"] = value
    kinds = tuple(config.layer_types[i] for i in layers)
    ssm = config.ssm if set(kinds) != {"attention"} else None
    return kept, dataclasses.replace(config, layer_types=kinds, ssm=ssm)
