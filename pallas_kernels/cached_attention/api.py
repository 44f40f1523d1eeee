"""Attention to a cache: validation and choice of implementation."""

from jaxtyping import Array, Float, Int

from pallas_kernels import checks, dispatch
from pallas_kernels.cached_attention import pallas_triton, reference, xla

IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.cached_attention,
    "xla": xla.cached_attention,
    "reference": reference.cached_attention,
}
APPEND_IMPLEMENTATIONS = {
    "pallas_triton": pallas_triton.rotate_and_append,
    "xla": xla.rotate_and_append,
    "reference": reference.rotate_and_append,
}


def cached_attention(
    q: Float[Array, "B T H P"],
    k: Float[Array, "B S K P"],
    v: Float[Array, "B S K P"],
    lengths: Int[Array, " B"],
    *,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H P"]:
    """Returns causal grouped-query attention of T new tokens to a cache that holds them.

    Query t of row b stands at position `lengths[b] + t`, slot s of the cache at position
    s. Scores, softmax and sums are float32 whatever the dtype of the inputs; weights are
    rounded to the values' dtype before they meet.

        y_t = softmax_s(q_t k_s / sqrt(P)) v_s   over the slots s that t sees

    Args:
      q: Queries of the new tokens; head h reads kv head h // (H // K).
      k: Keys, those of the new tokens included. Slots after a row's last token may hold
        anything finite.
      v: Values, likewise.
      lengths: Tokens of each row before the new ones; `lengths[b] + T <= S`.
      sliding_window: A token sees itself and the `sliding_window - 1` before it; all
        before it if None.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      The outputs in q.dtype.

    Raises:
      ValueError: A shape disagrees, the window is below 1, or the implementation's name
        is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "cached_attention"
    sizes = checks.check_shapes(
        op,
        {
            "q": (q, "B T H P"),
            "k": (k, "B S K P"),
            "v": (v, "B S K P"),
            "lengths": (lengths, "B"),
        },
    )
    checks.check_groups(op, "k", sizes["K"], sizes["H"])
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"{op}: sliding_window is {sliding_window}, expected 1 or more"
        )
    return dispatch.run(
        op,
        IMPLEMENTATIONS,
        implementation,
        q,
        k,
        v,
        lengths,
        sliding_window=sliding_window,
    )


def rotate_and_append(
    qkv: Float[Array, "B T (H+2K)*P"],
    k: Float[Array, "B S K P"],
    v: Float[Array, "B S K P"],
    lengths: Int[Array, " B"],
    frequencies: Float[Array, " P/2"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B S K P"], Float[Array, "B S K P"]]:
    """Returns the new tokens' queries, and the caches with their keys and values.

    What stands between the projections and `cached_attention`: queries and keys are
    turned by rotary position embedding (RoFormer, 2104.09864), pairs (i, i + P/2), in
    float32; keys and values go to slots `lengths[b] + t`.

    Args:
      qkv: All heads' queries, then keys, then values.
      k: Keys of the tokens before; overwritten where the caller lets it.
      v: Values, likewise.
      lengths: Tokens of each row before the new ones; `lengths[b] + T <= S`.
      frequencies: Radians per position of each pair.
      implementation: None for the fastest that runs here; a name for that one or an
        error.

    Returns:
      Queries in qkv.dtype, and both caches in their own dtype.

    Raises:
      ValueError: A shape disagrees, or the implementation's name is unknown.
      NotImplementedError: The named implementation does not run here.
    """
    op = "rotate_and_append"
    sizes = checks.check_shapes(
        op,
        {
            "k": (k, "B S K P"),
            "qkv": (qkv, "B T F"),
            "v": (v, "B S K P"),
            "lengths": (lengths, "B"),
        },
    )
    groups, width = sizes["K"], sizes["P"]
    half = {"P/2": width // 2}
    checks.check_shapes(op, {"frequencies": (frequencies, "P/2")}, half)
    heads, rest = divmod(qkv.shape[2], width)
    if rest or width % 2 or heads <= 2 * groups or heads % groups:
        raise ValueError(
            f"{op}: qkv has {qkv.shape[2]} columns, no queries, {groups} keys and "
            f"{groups} values of {width}"
        )
    return dispatch.run(
        op, APPEND_IMPLEMENTATIONS, implementation, qkv, k, v, lengths, frequencies
    )
