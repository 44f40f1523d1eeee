"""What Mamba and Mamba-2 mixers share: convolution, state, cache, commit and replay."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mil_jax import sharding
from mil_jax.models.cache import SSMCache, take_rows, write_rows
from pallas_kernels.causal_conv.api import causal_conv
from pallas_kernels.multi_step.api import Pending

# Raw step size of a token that must not touch the state: softplus gives exactly 0.
NO_STEP = -1e9


class Projected(NamedTuple):
    """What a mixer computes from its input before the convolution."""

    conv_in: Float[Array, "B L C"]  # un-repeated input of the convolution
    z: Float[Array, "B L E"]  # gate, before silu
    dt: Float[Array, "B L ..."] | None = None  # before bias and softplus
    B: Float[Array, "B L G N"] | None = None
    C: Float[Array, "B L G N"] | None = None


class ScanInputs(NamedTuple):
    """Inputs of the recurrence, all un-repeated."""

    x: Float[Array, "B L ..."]
    dt: Float[Array, "B L ..."]
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]


class SSMMixer(nnx.Module):
    """A state-space layer; subclasses define projections, scan and output.

    One code path serves training, prefill and decoding: they differ in where the state
    starts and in what of it is kept.
    """

    conv_kernel: nnx.Param
    conv_bias: nnx.Param

    @abc.abstractmethod
    def project(self, u: Float[Array, "B L D"]) -> Projected:
        """Returns everything that is computed from the layer's input alone."""

    @abc.abstractmethod
    def repeat(self, conv_in: Float[Array, "B L C"]) -> Float[Array, "B L F"]:
        """Repeats channels for grouped queries, where that happens before the conv."""

    @abc.abstractmethod
    def scan_inputs(
        self, projected: Projected, conv_out: Float[Array, "B L F"]
    ) -> ScanInputs:
        """Returns the recurrence's inputs."""

    @abc.abstractmethod
    def scan(
        self,
        inputs: ScanInputs,
        z: Float[Array, "B L E"],
        state: Float[Array, "..."] | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L E"], Float[Array, "..."]]:
        """Runs the recurrence over a sequence; returns gated outputs and the last state."""

    @abc.abstractmethod
    def step(
        self,
        inputs: ScanInputs,
        z: Float[Array, "B T E"],
        cache: SSMCache,
        num_pending: Int[Array, "B"],
    ) -> tuple[Float[Array, "B T E"], Float[Array, "..."]]:
        """Replays pending inputs, runs new ones; returns gated outputs and h_j."""

    @abc.abstractmethod
    def output(self, y: Float[Array, "B L E"]) -> Float[Array, "B L D"]:
        """Projects gated outputs back to the model's width."""

    def __call__(
        self,
        u: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Runs whole sequences; state and convolution restart at segment borders."""
        graphdef, weights = nnx.split(self)

        def mix(weights: nnx.State, rows: tuple) -> Float[Array, "B L E"]:
            mixer = nnx.merge(graphdef, weights)
            projected, segment_ids = rows
            conv_out = mixer._convolve(projected.conv_in, segment_ids=segment_ids)
            inputs = mixer.scan_inputs(projected, conv_out)
            return mixer.scan(inputs, projected.z, None, segment_ids)[0]

        # The compiler has no rule for splitting a kernel: it would gather the batch.
        y = sharding.by_rows(mix, weights, (self.project(u), segment_ids))
        return self.output(y)

    def prefill(
        self,
        u: Float[Array, "B L D"],
        cache: SSMCache,
        num_tokens: Int[Array, "B"],
    ) -> tuple[Float[Array, "B L D"], SSMCache]:
        """Continues the committed state over `num_tokens[b]` tokens and commits them.

        Tokens past `num_tokens` are padding: they leave state and window untouched.
        """
        projected = self.project(u)
        conv_out = self._convolve(projected.conv_in, window=cache.window)
        inputs = self.scan_inputs(projected, conv_out)
        is_token = jnp.arange(u.shape[1])[None] < num_tokens[:, None]
        inputs = inputs._replace(dt=_mask_steps(inputs.dt, is_token))
        y, state = self.scan(inputs, projected.z, cache.state, None)
        seen = jnp.concatenate([cache.window, projected.conv_in], axis=1)
        window = take_rows(seen, num_tokens, cache.window.shape[1])
        return self.output(y), dataclasses.replace(cache, state=state, window=window)

    def decode(
        self,
        u: Float[Array, "B T D"],
        cache: SSMCache,
        num_pending: Int[Array, "B"],
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T D"], SSMCache]:
        """MultiStep of paper Alg. 2: replays `num_pending` inputs, then runs T new ones.

        Args:
            u: The layer's input for the new tokens.
            cache: h_i and the inputs since.
            num_pending: j - i per row, how many of those inputs were accepted.
            commit: True writes h_j and makes the new tokens the pending ones; False keeps
                h_i and appends the new tokens to the pending ones.

        Returns:
            Outputs of the new tokens and the cache that holds them as pending.
        """
        projected = self.project(u)
        width = cache.window.shape[1]
        seen = jnp.concatenate([cache.window, cache.pending_window], axis=1)
        window = take_rows(seen, num_pending, width)
        conv_out = self._convolve(projected.conv_in, window=window)
        inputs = self.scan_inputs(projected, conv_out)
        y, state = self.step(inputs, projected.z, cache, num_pending)
        start = jnp.zeros_like(num_pending) if commit else num_pending
        pending = Pending(
            *(
                write_rows(old, new, start)
                for old, new in zip(
                    cache.pending, (inputs.x, inputs.dt, inputs.B), strict=True
                )
            )
        )
        pending_window = write_rows(cache.pending_window, projected.conv_in, start)
        if not commit:
            state, window = cache.state, cache.window
        return self.output(y), SSMCache(state, window, pending_window, pending)

    def _convolve(
        self,
        conv_in: Float[Array, "B L C"],
        *,
        window: Float[Array, "B V C"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L F"]:
        return causal_conv(
            self.repeat(conv_in),
            self.conv_kernel[...],
            self.conv_bias[...],
            initial_window=None if window is None else self.repeat(window),
            segment_ids=segment_ids,
            activation="silu",
        )


def _mask_steps(
    dt: Float[Array, "B L ..."], is_token: Bool[Array, "B L"]
) -> Float[Array, "B L ..."]:
    shaped = is_token.reshape(is_token.shape + (1,) * (dt.ndim - 2))
    return jnp.where(shaped, dt, jnp.asarray(NO_STEP, dt.dtype))


def dt_bias_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Returns softplus^-1(dt) for dt log-uniform in [1e-3, 1e-1], floored at 1e-4.

    Source: Mamba (2312.00752), Sec. 3.6.
    """
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    dt = jnp.maximum(dt, 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))
