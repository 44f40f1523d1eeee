"""The SwiGLU feed-forward layer of Llama."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.models.layers import Linear, RMSNorm, pack, project
from pallas_kernels.gated_product import gated_product

GATE_UP = ("gate_proj", "up_proj")


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        d, f, dtype = config.d_model, config.d_ff, compute.dtype
        self.gate_proj = Linear((d, f), ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up_proj = Linear((d, f), ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down_proj = Linear((f, d), ("mlp", "embed"), dtype=dtype, rngs=rngs)
        pack(self, compute, GATE_UP, may_transpose=False)
        pack(self, compute, ("down_proj",))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the layer to every token."""
        gate, up = project(self, GATE_UP, x)
        return self.down_proj(jax.nn.silu(gate) * up)

    def add_to(self, h: Float[Array, "B L D"], norm: RMSNorm) -> Float[Array, "B L D"]:
        """Returns `h + self(norm(h))`; for decoding, in two passes over the weights."""
        packed = getattr(self, "+".join(GATE_UP), None)
        if packed is None:
            return h + self(norm(h))
        kernel, scale = packed.kernel[...], norm.scale[...]
        return self.down_proj(gated_product(h, scale, kernel, eps=norm.eps), h)
