"""Causal depthwise convolution: validation and choice of implementation."""

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.causal_conv import pallas_triton, reference, xla

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.causal_conv,
    "xla": xla.causal_conv,
    "reference": reference.causal_conv,
}


def causal_conv(
    x: Float[Array, "B L C"],
    kernel: Float[Array, "W F"],
    bias: Float[Array, " F"] | None = None,
    *,
    initial_window: Float[Array, "B W-1 C"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    activation: Literal["silu"] | None = None,
    splits: tuple[int, ...] | None = None,
    group: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L F"] | tuple[Float[Array, "B L ..."], ...]:
    """Returns each channel convolved with its own W taps over the present and the past.

        y_t[f] = act(bias[f] + sum_{w < W} kernel[w, f] x_{t - (W - 1) + w}[c(f)])

    where c(f) = f, or the channel that f repeats.

    Source: the short convolution before the scan, Mamba (2312.00752) Sec. 3.4, Fig. 3.
    Sums are float32 whatever the input dtype.

    Args:
      x: Inputs, any float dtype.
      kernel: Taps; `kernel[W - 1]` multiplies the current token.
      bias: Added before the activation.
      initial_window: The W - 1 inputs before the first token, the latest one last; they
        belong to the first token's segment. Zeros if None.
      segment_ids: Taps that reach into another segment count as zero.
      activation: "silu" or None.
      splits: Channels of the parts in which the result is wanted, as separate arrays; a
        kernel writes them where another one can read them.
      group: Grouped-query expansion: each `group` channels of x are repeated F / C times,
        consecutively. All of them if None.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      y in x.dtype; with `splits` a tuple of its parts.

    Raises:
      ValueError: A shape disagrees, or the activation or the implementation is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "causal_conv"
    sizes = checks.check_shapes(
        op, {"x": (x, "B L C"), "kernel": (kernel, "W F"), "bias": (bias, "F")}
    )
    sizes["W-1"] = sizes["W"] - 1
    window = (initial_window, "B W-1 C")
    rest = {"initial_window": window, "segment_ids": (segment_ids, "B L")}
    checks.check_shapes(op, rest, sizes)
    channels, outputs = sizes["C"], sizes["F"]
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'silu' or None")
    if outputs % channels:
        raise ValueError(
            f"{op}: kernel has {outputs} channels, no multiple of the {channels} of x"
        )
    group = channels if group is None else group
    checks.check_group(op, group, channels)
    if splits is not None and (sum(splits) != outputs or min(splits, default=0) < 1):
        raise ValueError(f"{op}: splits {splits} do not add up to {outputs} channels")
    return dispatch.run(
        op,
        IMPLEMENTATIONS,
        implementation,
        x,
        kernel,
        bias,
        initial_window=initial_window,
        segment_ids=segment_ids,
        activation=activation,
        splits=None if splits is None else tuple(splits),
        group=group,
    )
