"""A pure Mamba layer's step: validation and choice of implementation."""

import functools

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.mamba_step import composed, pallas_triton
from pallas_kernels.mamba_step.arrays import Cache, Weights

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.mamba_step,
    "composed": composed.mamba_step,
    "reference": functools.partial(composed.mamba_step, implementation="reference"),
}


def mamba_step(
    xz: Float[Array, "B T 2E"],
    cache: Cache,
    num_pending: Int[Array, " B"],
    weights: Weights,
    *,
    commit: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], Cache]:
    """Returns the new tokens' gated outputs, and the cache with them as pending ones.

    MultiStep(h_i, y_1:n, i, j, k) of The Mamba in the Llama (2408.15237) Sec. 4.2, Alg. 2
    for a Mamba layer (2312.00752, Sec. 3.4) from after its first projection to before its
    last one: the first `num_pending` pending tokens take h_i to h_j, from there the new
    tokens go through convolution, maps to dt, B and C, recurrence, skip and gate.

    Args:
      xz: What the first projection gives for the T new tokens: x, then the gate z; any
        float dtype.
      cache: h_i and S >= T slots; `pending` tokens from slot 0 on.
      num_pending: How many of them count, in [0, S]: clamped, since it is traced.
      weights: The layer's parameters.
      commit: True keeps h_j and the window before it, and the new tokens are written from
        slot 0 on. False keeps h_i, and they follow the pending ones.
      implementation: None for the fastest that runs here; "composed" is the operations of
        this package in a row, "reference" their references.

    Returns:
      y in the dtype of `xz`, and the cache. What the slots behind the new tokens hold is
      not defined, but finite.

    Raises:
      ValueError: A shape disagrees, or the implementation is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "mamba_step"
    sizes = checks.check_shapes(
        op,
        {
            "xz": (xz, "B T 2E"),
            "state": (cache.state, "B E N"),
            "window": (cache.window, "B W-1 E"),
            "cache.xz": (cache.xz, "B S 2E"),
            "cache.x": (cache.x, "B S E"),
            "cache.dt": (cache.dt, "B S E"),
            "cache.maps": (cache.maps, "B S M"),
            "num_pending": (num_pending, "B"),
            "conv_kernel": (weights.conv_kernel, "W E"),
            "conv_bias": (weights.conv_bias, "E"),
            "maps": (weights.maps, "M E"),
            "dt_up": (weights.dt_up, "E R"),
            "dt_bias": (weights.dt_bias, "E"),
            "A_log": (weights.A_log, "E N"),
            "D": (weights.D, "E"),
        },
    )
    # What follows from other sizes.
    checks.check_shapes(
        op,
        {
            "xz": (xz, "B T 2E"),
            "window": (cache.window, "B W-1 E"),
            "maps": (weights.maps, "M E"),
        },
        sizes
        | {
            "2E": 2 * sizes["E"],
            "W-1": sizes["W"] - 1,
            "M": sizes["R"] + 2 * sizes["N"],
        },
    )
    tokens, slots = sizes["T"], sizes["S"]
    if tokens > slots:
        raise ValueError(f"{op}: {tokens} tokens do not fit into {slots} slots")
    run = (op, IMPLEMENTATIONS, implementation)
    return dispatch.run(*run, xz, cache, num_pending, weights, commit=commit)
