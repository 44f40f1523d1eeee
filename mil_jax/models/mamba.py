"""Mamba mixer (paper Alg. 1; Mamba, 2312.00752), hybrid or pure."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mil_jax import sharding
from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.models.cache import SSMCache
from mil_jax.models.layers import (
    Linear,
    Unnormed,
    make_param,
    pack,
    project,
    project_columns,
    uniform_init,
)
from mil_jax.models.ssm import Projected, ScanInputs, SSMMixer, dt_bias_init
from pallas_kernels.mamba_step import Cache as StepCache
from pallas_kernels.mamba_step import Weights as StepWeights
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.multi_step.api import Pending, selective_multi_step
from pallas_kernels.multi_step.columns import Columns, as_array, by_group
from pallas_kernels.selective_scan.api import selective_scan

X_Z = ("x_proj", "z_proj")
DT_B_C = ("dt_down", "B_proj", "C_proj")


class MambaMixer(SSMMixer):
    """Selective state space with one decay per channel and state.

    In a hybrid x, B and C start as the attention's values, keys and queries, in groups of N
    channels; in a pure Mamba (`ssm.inputs_from == "conv"`) dt, B and C are read from the
    convolved x and all channels share one group.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        ssm = config.ssm
        d, e, x, n, r = (
            config.d_model,
            ssm.d_inner,
            ssm.d_xb,
            ssm.d_state,
            ssm.dt_rank,
        )
        self.is_pure = ssm.inputs_from == "conv"
        bc_in, b_out, c_out = (e, n, n) if self.is_pure else (d, x, e)
        bc_axis = "d_inner" if self.is_pure else "embed"
        b_axis, c_axis = ("d_state",) * 2 if self.is_pure else ("d_xb", "d_inner")

        def linear(
            shape: tuple[int, int], axes: tuple[str, str], bound: float
        ) -> Linear:
            return Linear(
                shape, axes, dtype=compute.dtype, rngs=rngs, init=uniform_init(bound)
            )

        self.x_proj = linear((d, x), ("embed", "d_xb"), d**-0.5)
        self.z_proj = linear((d, e), ("embed", "d_inner"), d**-0.5)
        self.B_proj = linear((bc_in, b_out), (bc_axis, b_axis), bc_in**-0.5)
        self.C_proj = linear((bc_in, c_out), (bc_axis, c_axis), bc_in**-0.5)
        self.dt_down = linear((bc_in, r), (bc_axis, "dt_rank"), bc_in**-0.5)
        self.dt_up = linear((r, e), ("dt_rank", "d_inner"), r**-0.5)
        self.out_proj = linear((e, d), ("d_inner", "embed"), e**-0.5)
        # A hybrid's projections all read the layer's input.
        groups = (X_Z, DT_B_C) if self.is_pure else (X_Z + DT_B_C,)
        pack(self, compute, *groups, ("dt_up",), ("out_proj",))
        self.is_packed = compute.layout == "decode"
        self.dt_bias = make_param(dt_bias_init, (e,), ("d_inner",), rngs)
        taps = ssm.d_conv
        conv_init = uniform_init(taps**-0.5)
        self.conv_kernel = make_param(conv_init, (taps, e), ("conv", "d_inner"), rngs)
        self.conv_bias = make_param(conv_init, (e,), ("d_inner",), rngs)
        self.A_log = make_param(_A_log_init, (e, n), ("d_inner", "d_state"), rngs)
        self.D = make_param(jax.nn.initializers.ones, (e,), ("d_inner",), rngs)
        self.config = ssm
        self.conv_group = None if x == e else n
        self.implementation = compute.kernel
        self.checkpoint_every = compute.scan_checkpoint_every

    def project(self, u: Float[Array, "B L D"] | Unnormed) -> Projected:
        """Returns x, z and, in a hybrid, dt, B and C."""
        if self.is_pure:
            return Projected(*project_columns(self, X_Z, u))
        x, z, *dt_B_C = project_columns(self, X_Z + DT_B_C, u)
        return Projected(x, z, *self._dt_B_C(*dt_B_C))

    def decode(
        self,
        u: Float[Array, "B T D"] | Unnormed,
        cache: SSMCache,
        num_pending: Int[Array, "B"],
        residual: Float[Array, "B T D"] | None = None,
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T D"], SSMCache]:
        """Does what every mixer does; a pure one laid out for decoding in fewer kernels."""
        if not (self.is_pure and self.is_packed):
            return super().decode(u, cache, num_pending, residual, commit=commit)
        pending = (cache.pending_window, *cache.pending)
        mesh = sharding.current_mesh()
        y, new = mamba_step(
            getattr(self, "+".join(X_Z))(u),
            StepCache(cache.state, cache.window, *pending),
            num_pending,
            StepWeights(
                conv_kernel=self.conv_kernel[...],
                conv_bias=self.conv_bias[...],
                maps=getattr(self, "+".join(DT_B_C)).by_output,
                dt_up=self.dt_up.by_output,
                dt_bias=self.dt_bias[...],
                A_log=self.A_log[...],
                D=self.D[...],
            ),
            commit=commit,
            implementation=None if mesh is None or mesh.size == 1 else "composed",
        )
        state, window, pending_window, *pending = new
        cache = SSMCache(state, window, pending_window, Pending(*pending))
        return self.output(y, residual), cache

    def scan_inputs(
        self, projected: Projected, conv_out: Float[Array, "B L E"]
    ) -> ScanInputs:
        """Returns x after the convolution with dt, B and C."""
        if self.is_pure:
            dt_B_C = project(self, DT_B_C, conv_out)
            return ScanInputs(conv_out, *self._dt_B_C(*dt_B_C))
        return ScanInputs(conv_out, projected.dt, projected.B, projected.C)

    def scan(
        self,
        inputs: ScanInputs,
        z: Float[Array, "B L E"],
        state: Float[Array, "B E N"] | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
        """Runs the selective scan with skip and gate fused."""
        return selective_scan(
            inputs.x,
            inputs.dt,
            self._A(),
            inputs.B,
            inputs.C,
            D=self.D[...],
            z=z,
            dt_bias=self.dt_bias[...],
            initial_state=state,
            segment_ids=segment_ids,
            checkpoint_every=self.checkpoint_every,
            implementation=self.implementation,
        )

    def step(
        self,
        inputs: ScanInputs,
        z: Float[Array, "B T E"] | Columns,
        cache: SSMCache,
        num_pending: Int[Array, "B"],
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
        """Runs the multi-step kernel with skip and gate fused."""
        return selective_multi_step(
            cache.state,
            cache.pending,
            num_pending,
            inputs.x,
            inputs.dt,
            self.A_log[...],
            inputs.B,
            inputs.C,
            D=self.D[...],
            z=z,
            dt_bias=self.dt_bias[...],
            A_is_log=True,
            commit=commit,
        )

    def output(
        self, y: Float[Array, "B L E"], residual: jax.Array | None = None
    ) -> Float[Array, "B L D"]:
        """Applies out_proj."""
        return self.out_proj(y, residual)

    def _A(self) -> Float[Array, "E N"]:
        return -jnp.exp(self.A_log[...].astype(jnp.float32))

    def _dt_B_C(
        self,
        dt: Float[Array, "B L R"] | Columns,
        B: Float[Array, "B L X"] | Columns,
        C: Float[Array, "B L F"] | Columns,
    ) -> tuple[Float[Array, "B L E"], Array | Columns, Array | Columns]:
        n = self.config.d_state
        return self.dt_up(as_array(dt)), by_group(B, n), by_group(C, n)


def _A_log_init(
    key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "E N"]:
    """Returns log(1..N) for every channel (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
