"""Mamba-2 mixer (2405.21060) with one group per head, started from attention."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.models.cache import SSMCache
from mil_jax.models.layers import (
    Linear,
    Unnormed,
    make_param,
    normed,
    pack,
    product_of_all,
    project_columns,
    uniform_init,
)
from mil_jax.models.ssm import Projected, ScanInputs, SSMMixer, dt_bias_init
from pallas_kernels.gated_norm.api import gated_norm
from pallas_kernels.multi_step.api import ssd_multi_step
from pallas_kernels.multi_step.columns import Columns, as_array
from pallas_kernels.ssd.api import ssd

INPUTS = ("x_proj", "B_proj", "C_proj", "z_proj", "dt_proj")

# Of the gated norm; fixed in the released models.
GATED_NORM_EPS = 1e-5


class Mamba2Mixer(SSMMixer):
    """State-space duality layer: scalar decay per head, N = P = head_dim.

    x, B and C start as the attention's values, keys and queries; the convolution runs over
    all three before the grouped-query expansion, which the kernel performs by indexing.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        ssm = config.ssm
        d, e, x, h = config.d_model, ssm.d_inner, ssm.d_xb, config.n_heads

        def linear(shape: tuple[int, int], axes: tuple[str, str]) -> Linear:
            init = uniform_init(shape[0] ** -0.5)
            return Linear(shape, axes, dtype=compute.dtype, rngs=rngs, init=init)

        self.z_proj = linear((d, e), ("embed", "d_inner"))
        self.x_proj = linear((d, x), ("embed", "d_xb"))
        self.B_proj = linear((d, x), ("embed", "d_xb"))
        self.C_proj = linear((d, e), ("embed", "d_inner"))
        self.dt_proj = linear((d, h), ("embed", "ssm_heads"))
        self.out_proj = linear((e, d), ("d_inner", "embed"))
        pack(self, compute, INPUTS, ("out_proj",))
        self.is_packed = compute.layout == "decode"
        taps, channels = ssm.d_conv, 2 * x + e
        conv_init = uniform_init(taps**-0.5)
        self.conv_kernel = make_param(
            conv_init, (taps, channels), ("conv", "conv_channels"), rngs
        )
        self.conv_bias = make_param(conv_init, (channels,), ("conv_channels",), rngs)
        self.A_log = make_param(_A_log_init, (h,), ("ssm_heads",), rngs)
        self.D = make_param(jax.nn.initializers.ones, (h,), ("ssm_heads",), rngs)
        self.dt_bias = make_param(dt_bias_init, (h,), ("ssm_heads",), rngs)
        self.norm = GatedNorm(e, e // h, rngs=rngs)
        self.config = ssm
        self.conv_group = None
        self.conv_splits = (x, x, e)
        self.n_heads, self.n_kv_heads = h, config.n_kv_heads
        self.implementation = compute.kernel

    def project(self, u: Float[Array, "B L D"] | Unnormed) -> Projected:
        """Returns [x, B, C] for the convolution, the gate and dt."""
        if self.is_packed:
            x, B, C, z, dt = project_columns(self, INPUTS, u)
            width = x.sizes[0] + B.sizes[0] + C.sizes[0]
            return Projected(dataclasses.replace(x, sizes=(width,)), z, dt)
        u = normed(u)
        conv_in = product_of_all(u, self.x_proj, self.B_proj, self.C_proj)
        return Projected(conv_in, self.z_proj(u), self.dt_proj(u))

    def scan_inputs(
        self,
        projected: Projected,
        conv_out: tuple[Float[Array, "B L ..."], ...],
    ) -> ScanInputs:
        """Cuts the parts of the convolution's output into heads."""
        heads = (self.n_kv_heads, self.n_kv_heads, self.n_heads)
        x, B, C = (
            part.reshape(*part.shape[:2], count, -1)
            for part, count in zip(conv_out, heads, strict=True)
        )
        return ScanInputs(x, projected.dt, B, C)

    def scan(
        self,
        inputs: ScanInputs,
        z: Float[Array, "B L E"],
        state: Float[Array, "B H N P"] | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B H N P"]]:
        """Runs the SSD recurrence, then the gated norm."""
        y, state = ssd(
            inputs.x,
            inputs.dt,
            self._A(),
            inputs.B,
            inputs.C,
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            initial_state=state,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return self.norm(y.reshape(z.shape), z), state

    def step(
        self,
        inputs: ScanInputs,
        z: Float[Array, "B T E"] | Columns,
        cache: SSMCache,
        num_pending: Int[Array, "B"],
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B H N P"]]:
        """Runs the multi-step kernel, then the gated norm."""
        y, state = ssd_multi_step(
            cache.state,
            cache.pending,
            num_pending,
            inputs.x,
            inputs.dt,
            self.A_log[...],
            inputs.B,
            inputs.C,
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            A_is_log=True,
            commit=commit,
        )
        z = as_array(z)
        return self.norm(y.reshape(z.shape), z), state

    def output(
        self, y: Float[Array, "B L E"], residual: jax.Array | None = None
    ) -> Float[Array, "B L D"]:
        """Applies out_proj."""
        return self.out_proj(y, residual)

    def _A(self) -> Float[Array, "H"]:
        return -jnp.exp(self.A_log[...].astype(jnp.float32))


class GatedNorm(nnx.Module):
    """`rmsnorm(y * silu(z)) * scale` with one statistic per head."""

    def __init__(self, size: int, group: int, *, rngs: nnx.Rngs):
        self.scale = make_param(jax.nn.initializers.ones, (size,), ("d_inner",), rngs)
        self.group = group

    def __call__(
        self, y: Float[Array, "B L E"], z: Float[Array, "B L E"]
    ) -> Float[Array, "B L E"]:
        """Returns the gated, normalised output in the dtype of `y`."""
        groups = y.shape[-1] // self.group
        return gated_norm(y, z, self.scale[...], groups=groups, eps=GATED_NORM_EPS)


def _A_log_init(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "H"]:
    """Returns log A for A uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
