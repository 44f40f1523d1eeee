"""What a model keeps between calls while it generates."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.errors import UserError
from pallas_kernels.multi_step.api import Pending


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values; slot s holds position s. Slots past a row's length are stale."""

    k: Float[Array, "B S K P"]
    v: Float[Array, "B S K P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SSMCache:
    """A committed state and the inputs seen since, which may yet be taken back.

    Paper Alg. 2 keeps one state h_i and replays accepted inputs from it, so that a rejected
    draft token costs no copy of a state.

    Attributes:
        state: h_i, float32: [B, E, N] (Mamba) or [B, H, N, P] (Mamba-2).
        window: The W-1 inputs of the convolution before position i, un-repeated.
        pending_window: Inputs of the convolution from position i on, [B, S, C]; where one
            product holds them among others, that product.
        pending: Inputs of the scan from position i on: x after the convolution, dt before
            softplus, B or the product that holds it; S slots each, None for what is in
            the product above.
    """

    state: Float[Array, "..."]
    window: Float[Array, "B V C"]
    pending_window: Float[Array, "B S ..."]
    pending: Pending


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridCache:
    """Caches of all layers and how far each row has come.

    Attributes:
        layers: One `KVCache` or `SSMCache` per layer.
        lengths: Tokens consumed per row, pending ones included.
        num_pending: How many of them lie after the committed state (`SSMCache.pending`).
    """

    layers: tuple[KVCache | SSMCache, ...]
    lengths: Int[Array, "B"]
    num_pending: Int[Array, "B"]

    def keep(self, num_tokens: Int[Array, "B"]) -> "HybridCache":
        """Keeps the first `num_tokens` tokens after the committed state, drops the rest.

        Rolls attention, states and convolutions back alike: nothing is moved, the next call
        starts from the kept prefix.
        """
        lengths = self.lengths - self.num_pending + num_tokens
        return dataclasses.replace(self, lengths=lengths, num_pending=num_tokens)

    def with_max_step(self, max_step: int) -> "HybridCache":
        """Returns the cache with room for so many tokens, at least those now pending."""
        resized = [
            layer
            if isinstance(layer, KVCache)
            else dataclasses.replace(
                layer, **_resize((layer.pending_window, layer.pending), max_step)
            )
            for layer in self.layers
        ]
        return dataclasses.replace(self, layers=tuple(resized))


@functools.partial(jax.jit, static_argnames="max_step")
def _resize(slots: tuple[jax.Array, Pending], max_step: int) -> dict[str, Any]:
    def resize(values: jax.Array) -> jax.Array:
        missing = max(max_step - values.shape[1], 0)
        padding = [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2)
        return jnp.pad(values[:, :max_step], padding)

    pending_window, pending = jax.tree.map(resize, slots)
    return {"pending_window": pending_window, "pending": pending}


def init_cache(
    config: ModelConfig,
    compute: ComputeConfig,
    *,
    batch: int,
    max_length: int,
    max_step: int = 1,
) -> HybridCache:
    """Returns an empty cache.

    Args:
        config: The model's architecture.
        compute: Its dtypes.
        batch: Rows B.
        max_length: Most tokens a row may reach, prompt and answer together.
        max_step: Most tokens after a committed state, S (1 for plain decoding, K + 1 for
            speculation with K drafts).

    Raises:
        UserError: A size is below 1.
    """
    for name, value in (
        ("batch", batch),
        ("max_length", max_length),
        ("max_step", max_step),
    ):
        if value < 1:
            raise UserError(f"cache: {name} is {value}; it must be at least 1")
    dtype = jnp.dtype(compute.dtype)
    # A step writes its tokens before they are counted, so the buffer holds one step more.
    slots = max_length + max_step
    layers = []
    for kind in config.layer_types:
        if kind == "attention":
            shape = (batch, slots, config.n_kv_heads, config.head_dim)
            layers.append(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
        else:
            layers.append(_init_ssm_cache(config, compute, kind, batch, max_step))
    zeros = jnp.zeros((batch,), jnp.int32)
    return HybridCache(tuple(layers), zeros, zeros)


def _init_ssm_cache(
    config: ModelConfig, compute: ComputeConfig, kind: str, batch: int, max_step: int
) -> SSMCache:
    ssm, dtype = config.ssm, jnp.dtype(compute.dtype)
    # Laid out for decoding, the inputs of one product are kept together.
    is_packed = compute.layout == "decode"
    if kind == "mamba":
        is_pure = ssm.inputs_from == "conv"
        groups = 1 if is_pure else ssm.d_xb // ssm.d_state
        state = (batch, ssm.d_inner, ssm.d_state)
        x, dt = (ssm.d_inner,), (ssm.d_inner,)
        b, conv = (groups, ssm.d_state), ssm.d_xb
        packed = ssm.d_xb + ssm.d_inner
        if is_packed and is_pure:
            # What gives dt, B and C is one product too, of another input.
            b = (ssm.dt_rank + 2 * ssm.d_state,)
        elif is_packed:
            packed += ssm.dt_rank + ssm.d_xb + ssm.d_inner
            b = None
    else:
        heads, kv_heads = config.n_heads, config.n_kv_heads
        state = (batch, heads, ssm.d_state, ssm.d_inner // heads)
        x, dt = (kv_heads, ssm.d_xb // kv_heads), None if is_packed else (heads,)
        b, conv = (kv_heads, ssm.d_state), 2 * ssm.d_xb + ssm.d_inner
        packed = conv + ssm.d_inner + heads

    def zeros(slots: int, shape: tuple[int, ...] | None) -> jax.Array | None:
        return None if shape is None else jnp.zeros((batch, slots, *shape), dtype)

    return SSMCache(
        state=jnp.zeros(state, jnp.float32),
        window=zeros(ssm.d_conv - 1, (conv,)),
        pending_window=zeros(max_step, (packed if is_packed else conv,)),
        pending=Pending(*(zeros(max_step, shape) for shape in (x, dt, b))),
    )


def take_rows(
    values: Float[Array, "B L *C"], start: Int[Array, "B"], size: int
) -> Float[Array, "B S *C"]:
    """Returns `values[b, start[b] : start[b] + size]` for every row b."""
    return jax.vmap(
        lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=0)
    )(values, start)


def write_rows(
    buffer: Float[Array, "B S *C"],
    values: Float[Array, "B T *C"],
    start: Int[Array, "B"],
) -> Float[Array, "B S *C"]:
    """Returns `buffer` with `values[b]` written at `buffer[b, start[b]:]`."""
    return jax.vmap(
        lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0)
    )(buffer, values.astype(buffer.dtype), start)
