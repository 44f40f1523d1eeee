"""Parameters, linear maps, embedding and norm: the parts every layer is made of."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

# Standard deviation of Llama's initialisation (`initializer_range`).
normal_init = jax.nn.initializers.normal(0.02)


def uniform_init(bound: float) -> Initializer:
    """Returns an initialiser that draws from U(-bound, bound)."""

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def make_param(
    init: Initializer, shape: Sequence[int], axes: tuple[str, ...], rngs: nnx.Rngs
) -> nnx.Param:
    """Returns a float32 parameter that carries its logical axis names.

    Args:
        init: Called with a key, the shape and float32.
        shape: One size per dimension.
        axes: One logical axis name per dimension (see `mil_jax.sharding`).
        rngs: Source of the key.
    """
    value = init(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, logical_axes=axes)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` with the kernel cast to `dtype`; kernel is [in, out]."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        dtype: str,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        init: Initializer = normal_init,
    ):
        self.kernel = make_param(init, shape, axes, rngs)
        self.bias = (
            make_param(jax.nn.initializers.zeros, shape[1:], axes[1:], rngs)
            if use_bias
            else None
        )
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns the product in `dtype`."""
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)


class Embedding(nnx.Module):
    """Token table [V, D]; with tied embeddings also the language-model head."""

    def __init__(self, vocab_size: int, d_model: int, *, dtype: str, rngs: nnx.Rngs):
        self.embedding = make_param(
            normal_init, (vocab_size, d_model), ("vocab", "embed"), rngs
        )
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Looks rows up."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, statistics in float32."""

    def __init__(self, size: int, *, axis: str, eps: float, rngs: nnx.Rngs):
        self.scale = make_param(jax.nn.initializers.ones, (size,), (axis,), rngs)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the normalised input in the dtype of `x`."""
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "..."], eps: float
) -> Float[Array, "*B D"]:
    """Returns `x / sqrt(mean(x^2) + eps) * scale` in the dtype of `x`.

    As Llama does, the normalised value is rounded to the dtype of `x` before it is scaled.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normed * jnp.broadcast_to(scale.astype(x.dtype), x.shape)
