"""What Mamba and Mamba-2 mixers share: convolution, state, cache, commit and replay."""

import abc
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mil_jax import sharding
from mil_jax.models.cache import SSMCache, take_rows, write_rows
from mil_jax.models.layers import Unnormed
from pallas_kernels.causal_conv.api import causal_conv
from pallas_kernels.multi_step.api import Pending, conv_multi_step
from pallas_kernels.multi_step.columns import Columns, as_array

# Raw step size of a token that must not touch the state: softplus gives exactly 0.
NO_STEP = -1e9


class Projected(NamedTuple):
    """What a mixer computes from its input before the convolution."""

    conv_in: Float[Array, "B L C"] | Columns  # un-repeated input of the convolution
    z: Float[Array, "B L E"] | Columns  # gate, before silu
    dt: Float[Array, "B L ..."] | Columns | None = None  # before bias and softplus
    B: Float[Array, "B L G N"] | Columns | None = None
    C: Float[Array, "B L G N"] | Columns | None = None

    def arrays(self) -> "Projected":
        """Returns them cut out of the product that holds them."""
        return Projected(*map(as_array, self))


class ScanInputs(NamedTuple):
    """Inputs of the recurrence, all un-repeated."""

    x: Float[Array, "B L ..."]
    dt: Float[Array, "B L ..."] | Columns
    B: Float[Array, "B L G N"] | Columns
    C: Float[Array, "B L G N"] | Columns


class SSMMixer(nnx.Module):
    """A state-space layer; subclasses define projections, scan and output.

    One code path serves training, prefill and decoding: they differ in where the state
    starts and in what of it is kept.
    """

    conv_kernel: nnx.Param
    conv_bias: nnx.Param
    # Channels that the convolution repeats as one for grouped queries; None for none.
    conv_group: int | None
    # Parts of the convolution's output that the recurrence reads; None for one.
    conv_splits: tuple[int, ...] | None = None

    @abc.abstractmethod
    def project(self, u: Float[Array, "B L D"] | Unnormed) -> Projected:
        """Returns everything that is computed from the layer's input alone."""

    @abc.abstractmethod
    def scan_inputs(
        self,
        projected: Projected,
        conv_out: Float[Array, "B L F"] | tuple[Float[Array, "B L ..."], ...],
    ) -> ScanInputs:
        """Returns the recurrence's inputs; the convolution's output may be in parts."""

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
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "..."]]:
        """Replays pending inputs, runs new ones; returns gated outputs and h_j.

        Without `commit`, h_i in its place.
        """

    @abc.abstractmethod
    def output(
        self, y: Float[Array, "B L E"], residual: jax.Array | None = None
    ) -> Float[Array, "B L D"]:
        """Projects gated outputs back to the model's width, and adds them to `residual`."""

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
        rows = (self.project(u).arrays(), segment_ids)
        y = sharding.by_rows(mix, weights, rows)
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
        projected = self.project(u).arrays()
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
        u: Float[Array, "B T D"] | Unnormed,
        cache: SSMCache,
        num_pending: Int[Array, "B"],
        residual: Float[Array, "B T D"] | None = None,
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T D"], SSMCache]:
        """MultiStep of paper Alg. 2: replays `num_pending` inputs, then runs T new ones.

        Args:
            u: The layer's input for the new tokens.
            cache: h_i and the inputs since.
            num_pending: j - i per row, how many of those inputs were accepted.
            residual: The outputs are added to it.
            commit: True writes h_j and makes the new tokens the pending ones; False keeps
                h_i and appends the new tokens to the pending ones.

        Returns:
            Outputs of the new tokens and the cache that holds them as pending.
        """
        projected = self.project(u)
        conv_out, window = conv_multi_step(
            cache.window,
            _pending_of(projected.conv_in, cache.pending_window, cache),
            num_pending,
            projected.conv_in,
            self.conv_kernel[...],
            self.conv_bias[...],
            group=self.conv_group,
            splits=self.conv_splits,
            commit=commit,
        )
        inputs = self.scan_inputs(projected, conv_out)
        replayed = Pending(inputs.x, inputs.dt, inputs.B)
        pairs = zip(replayed, cache.pending, strict=True)
        old = (_pending_of(*pair, cache) for pair in pairs)
        y, state = self.step(
            inputs,
            projected.z,
            dataclasses.replace(cache, pending=Pending(*old)),
            num_pending,
            commit=commit,
        )
        old = (cache.pending_window, cache.pending)
        new = (_stored(projected.conv_in), Pending(*map(_stored_alone, replayed)))
        if commit and y.shape[1] == cache.pending_window.shape[1]:
            # Every slot is written: the new tokens are the pending ones, uncopied.
            write = _as_stored
        else:
            start = jnp.zeros_like(num_pending) if commit else num_pending
            write = functools.partial(write_rows, start=start)
        pending_window, pending = jax.tree.map(write, old, new)
        cache = SSMCache(state, window, pending_window, pending)
        return self.output(y, residual), cache

    def _convolve(
        self,
        conv_in: Float[Array, "B L C"],
        *,
        window: Float[Array, "B V C"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L F"] | tuple[Float[Array, "B L ..."], ...]:
        return causal_conv(
            conv_in,
            self.conv_kernel[...],
            self.conv_bias[...],
            initial_window=window,
            segment_ids=segment_ids,
            activation="silu",
            splits=self.conv_splits,
            group=self.conv_group,
        )


def _pending_of(
    new: Array | Columns, old: Array | None, cache: SSMCache
) -> Array | Columns:
    """Returns the pending tokens' values that correspond to those of the new ones."""
    if isinstance(new, Columns):
        return dataclasses.replace(new, values=cache.pending_window)
    return old


def _stored(new: Array | Columns) -> Array:
    """What the cache keeps of the convolution's input: the product that holds it."""
    return new.values if isinstance(new, Columns) else new


def _stored_alone(new: Array | Columns) -> Array | None:
    """What it keeps of another input: nothing where that product holds it as well."""
    return None if isinstance(new, Columns) else new


def _as_stored(old: jax.Array, new: jax.Array) -> jax.Array:
    return new.astype(old.dtype)


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
