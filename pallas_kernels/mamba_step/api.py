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
    checks.check_rank(op, "xz", xz, "B T 2E")
    checks.check_rank(op, "state", cache.state, "B E N")
    checks.check_rank(op, "cache.xz", cache.xz, "B S 2E")
    checks.check_rank(op, "conv_kernel", weights.conv_kernel, "W E")
    checks.check_rank(op, "dt_up", weights.dt_up, "E R")
    (batch, tokens), (_, e, n) = xz.shape[:2], cache.state.shape
    slots, width = cache.xz.shape[1], weights.conv_kernel.shape[0]
    rank = weights.dt_up.shape[1]
    m = rank + 2 * n
    for name, value, letters, expected in (
        ("xz", xz, "B T 2E", (batch, tokens, 2 * e)),
        ("state", cache.state, "B E N", (batch, e, n)),
        ("window", cache.window, "B W-1 E", (batch, width - 1, e)),
        ("cache.xz", cache.xz, "B S 2E", (batch, slots, 2 * e)),
        ("cache.x", cache.x, "B S E", (batch, slots, e)),
        ("cache.dt", cache.dt, "B S E", (batch, slots, e)),
        ("cache.maps", cache.maps, "B S M", (batch, slots, m)),
        ("num_pending", num_pending, "B", (batch,)),
        ("conv_kernel", weights.conv_kernel, "W E", (width, e)),
        ("conv_bias", weights.conv_bias, "E", (e,)),
        ("maps", weights.maps, "M E", (m, e)),
        ("dt_up", weights.dt_up, "E R", (e, rank)),
        ("dt_bias", weights.dt_bias, "E", (e,)),
        ("A_log", weights.A_log, "E N", (e, n)),
        ("D", weights.D, "E", (e,)),
    ):
        checks.check_shape(op, name, value, letters, expected)
    if tokens > slots:
        raise ValueError(f"{op}: {tokens} tokens do not fit into {slots} slots")
    run = (op, IMPLEMENTATIONS, implementation)
    return dispatch.run(*run, xz, cache, num_pending, weights, commit=commit)
