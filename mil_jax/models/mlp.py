"""The SwiGLU feed-forward layer of Llama."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.models.layers import Linear


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        d, f, dtype = config.d_model, config.d_ff, compute.dtype
        self.gate_proj = Linear((d, f), ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up_proj = Linear((d, f), ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down_proj = Linear((f, d), ("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the layer to every token."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
