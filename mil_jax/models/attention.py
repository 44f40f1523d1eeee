"""Grouped-query attention with RoPE and an optional sliding window, as in the teachers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mil_jax import sharding
from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.models import rope
from mil_jax.models.cache import KVCache, write_rows
from mil_jax.models.layers import Linear, RMSNorm, pack, project
from pallas_kernels.cached_attention import (
    cached_attention,
    rotate_and_append,
    rotation,
)

QKV = ("q_proj", "k_proj", "v_proj")


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
        pack(self, compute, QKV, ("o_proj",))
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
        c = self.config

        def attend(_: None, rows: tuple) -> tuple:
            new, k, v, lengths = rows
            if c.qk_norm:
                q, new_k, new_v = new
                k, v = write_rows(k, new_k, lengths), write_rows(v, new_v, lengths)
            else:
                q, k, v = rotate_and_append(new, k, v, lengths, self._frequencies())
            window = c.sliding_window
            return cached_attention(q, k, v, lengths, sliding_window=window), k, v

        if c.qk_norm:
            new = self._project(u, rotation.next_positions(lengths, u.shape[1]))
        else:
            new = jnp.concatenate(project(self, QKV, u), axis=-1)
        # The compiler has no rule for splitting a kernel: it would gather the caches.
        rows = (new, cache.k, cache.v, lengths)
        out, k, v = sharding.by_rows(attend, None, rows)
        return self._output(out), KVCache(k, v)

    def _project(
        self, u: Float[Array, "B L D"], positions: Int[Array, "B L"]
    ) -> tuple[
        Float[Array, "B L H P"], Float[Array, "B L K P"], Float[Array, "B L K P"]
    ]:
        """Returns rotated queries and keys, and values."""
        c = self.config
        q, k, v = (
            a.reshape(*u.shape[:2], -1, c.head_dim) for a in project(self, QKV, u)
        )
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        angles = rotation.cos_and_sin(positions, self._frequencies())
        q, k = (rotation.rotate(a, *angles) for a in (q, k))
        return q, k, v

    def _frequencies(self) -> np.ndarray:
        c = self.config
        return rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)

    def _output(self, out: Float[Array, "B L H P"]) -> Float[Array, "B L D"]:
        return self.o_proj(out.reshape(*out.shape[:2], -1))
