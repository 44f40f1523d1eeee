"""What a pure Mamba layer keeps between steps, and its weights between the projections."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Cache(NamedTuple):
    """A committed state and S slots for tokens since, with M = R + 2 N.

    Attributes:
        state: h_i, float32.
        window: The W - 1 inputs of the convolution before position i.
        xz: What the first projection gave for the pending tokens; z is never read.
        x: Their inputs of the recurrence, after the convolution.
        dt: Their raw step sizes.
        maps: Their step sizes of low rank, B and C side by side.
    """

    state: Float[Array, "B E N"]
    window: Float[Array, "B W-1 E"]
    xz: Float[Array, "B S 2E"]
    x: Float[Array, "B S E"]
    dt: Float[Array, "B S E"]
    maps: Float[Array, "B S M"]


class Weights(NamedTuple):
    """The layer's parameters between its projections.

    Attributes:
        conv_kernel: Taps; the last one multiplies the current token.
        conv_bias: Added before the silu.
        maps: Of dt (low rank), B and C, one below the other, as [out, in].
        dt_up: From the low rank to the channels, as [out, in].
        dt_bias: Added to dt before its softplus.
        A_log: log(-A), float32.
        D: Skip weights, float32.
    """

    conv_kernel: Float[Array, "W E"]
    conv_bias: Float[Array, " E"]
    maps: Float[Array, "M E"]
    dt_up: Float[Array, "E R"]
    dt_bias: Float[Array, " E"]
    A_log: Float[Array, "E N"]
    D: Float[Array, " E"]
