"""Shared by the Triton kernels: where they run, and the hardware's approximations."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import UnsupportedError

# Interpret the kernels instead of compiling them; tests on a CPU set it.
INTERPRET = False

LOG2_E = 1.4426950408889634


def check_platform() -> None:
    """Raises UnsupportedError unless programs traced here are for a CUDA GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if not INTERPRET and platform not in ("gpu", "cuda"):
        raise UnsupportedError(f"needs a CUDA GPU, this is a {platform}")


def _approximate(name: str, value: jax.Array) -> jax.Array:
    """One instruction, where the compiler's own choice is a function with edge cases."""
    [result] = plt.elementwise_inline_asm(
        f"{name}.approx.ftz.f32 $0, $1;",
        args=[value],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(value.shape, value.dtype)],
    )
    return result


def exp2(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 2^v within 2 units in the last place."""
    return jnp.exp2(value) if INTERPRET else _approximate("ex2", value)


def softplus(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns log(1 + e^v), accurate relative to itself where it is small as well."""
    e = exp2(jnp.abs(value) * -LOG2_E)
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * 0.25)))
    log2 = jnp.log2(1.0 + e) if INTERPRET else _approximate("lg2", 1.0 + e)
    log = log2 * (1.0 / LOG2_E)
    return jnp.maximum(value, 0.0) + jnp.where(e < 0.03, series, log)


def sigmoid(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 1 / (1 + e^-v)."""
    denominator = 1.0 + exp2(value * -LOG2_E)
    return 1.0 / denominator if INTERPRET else _approximate("rcp", denominator)


def power_of_two(size: int, least: int = 1) -> int:
    """Returns the smallest power of two that is neither below `size` nor `least`."""
    return max(least, 1 << (size - 1).bit_length())
