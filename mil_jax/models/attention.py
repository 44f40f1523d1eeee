"""Grouped-query attention with RoPE and an optional sliding window, as in the teachers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.models import rope
from mil_jax.models.cache import KVCache, write_rows
from mil_jax.models.layers import Linear, RMSNorm


def default_attention(compute: ComputeConfig) -> str:
    """Returns the attention implementation that `compute` asks for or this host prefers."""
    if compute.attention != "auto":
        return compute.attention
    on_gpu = jax.default_backend() == "gpu"
    return "cudnn" if on_gpu and compute.dtype == "bfloat16" else "xla"


class Attention(nnx.Module):
    """Multi-head attention; query heads share K key/value heads."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        d, p = config.d_model, config.head_dim
        q_dim, kv_dim = config.n_heads * p, config.n_kv_heads * p
        kwargs = {"dtype": compute.dtype, "rngs": rngs}
        biased = kwargs | {"use_bias": config.attention_bias}
        self.q_proj = Linear((d, q_dim), ("embed", "heads"), **biased)
        self.k_proj = Linear((d, kv_dim), ("embed", "kv_heads"), **biased)
        self.v_proj = Linear((d, kv_dim), ("embed", "kv_heads"), **biased)
        self.o_proj = Linear((q_dim, d), ("heads", "embed"), **kwargs)
        self.q_norm, self.k_norm = (
            RMSNorm(p, axis="head_dim", eps=config.rms_norm_eps, rngs=rngs)
            if config.qk_norm
            else None
            for _ in range(2)
        )
        self.config = config
        self.implementation = default_attention(compute)

    def __call__(
        self,
        u: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns causal attention within each segment."""
        q, k, v = self._project(u, positions)
        mask = None
        if segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        window = self.config.sliding_window
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=self.implementation,
        )
        return self._output(out)

    def cached(
        self,
        u: Float[Array, "B T D"],
        cache: KVCache,
        lengths: Int[Array, "B"],
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Appends T tokens at positions `lengths + t` and attends to the cache.

        Prefill and decoding are this one method: a row's stale or padded slots lie at
        positions after its queries and are masked by causality.
        """
        positions = lengths[:, None] + jnp.arange(u.shape[1], dtype=jnp.int32)[None]
        q, k, v = self._project(u, positions)
        cache = KVCache(
            write_rows(cache.k, k, lengths), write_rows(cache.v, v, lengths)
        )
        slots = jnp.arange(cache.k.shape[1], dtype=jnp.int32)[None, None]
        visible = slots <= positions[:, :, None]
        if self.config.sliding_window is not None:
            visible &= slots > positions[:, :, None] - self.config.sliding_window
        return self._output(attend(q, cache.k, cache.v, visible)), cache

    def _project(
        self, u: Float[Array, "B L D"], positions: Int[Array, "B L"]
    ) -> tuple[
        Float[Array, "B L H P"], Float[Array, "B L K P"], Float[Array, "B L K P"]
    ]:
        """Returns rotated queries and keys, and values."""
        c = self.config
        q = self.q_proj(u).reshape(*u.shape[:2], c.n_heads, c.head_dim)
        k = self.k_proj(u).reshape(*u.shape[:2], c.n_kv_heads, c.head_dim)
        v = self.v_proj(u).reshape(*u.shape[:2], c.n_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies = rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        q, k = (rope.rotate(a, positions, frequencies) for a in (q, k))
        return q, k, v

    def _output(self, out: Float[Array, "B L H P"]) -> Float[Array, "B L D"]:
        return self.o_proj(out.reshape(*out.shape[:2], -1))


def attend(
    q: Float[Array, "B T H P"],
    k: Float[Array, "B S K P"],
    v: Float[Array, "B S K P"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H P"]:
    """Returns softmax(q k / sqrt(P)) v over the visible slots, softmax in float32."""
    batch, steps, heads, dim = q.shape
    grouped = q.reshape(batch, steps, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum(
        "btkrp,bskp->bkrts", grouped, k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(visible[:, None, None], scores * dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkrts,bskp->btkrp", weights, v).reshape(q.shape)
