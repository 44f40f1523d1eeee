"""Softplus and gate on a GPU, as good as bfloat16 inputs and outputs need.

The kernels on tensor cores use these: their inputs and outputs have 8 bits, and the time
goes into issuing instructions. The kernels for other dtypes use the forms in
`pallas_triton_kernels`, which are good to float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.selective_scan import pallas_triton_kernels as kernels

# log1p(u) / u on [0, 1], highest power first (a minimax fit by linear programming, 1 at
# u = 0). Relative error below 1e-5, and so softplus's, for step sizes however small.
LOG1P = (
    -0.024728896,
    0.10357778,
    -0.21239024,
    0.3262206,
    -0.49953872,
    1.0,
)


def _lanewise(code, value):
    """Runs PTX from register $1 to register $0 on each float32 value."""
    [result] = plt.elementwise_inline_asm(
        code,
        args=[value],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(value.shape, jnp.float32)],
    )
    return result


def _tanh(value, plan):
    """One instruction; relative error below 2^-11, so -1 and 1 where it is near those."""
    if plan.interpret:
        return jnp.tanh(value)
    return _lanewise("tanh.approx.f32 $0, $1;", value)


def softplus(v, plan):
    """(softplus(v), exp(-|v|)), both with a relative error below 2e-5."""
    if plan.interpret:
        u = jnp.exp2(jnp.abs(v) * -kernels.LOG2E)
    else:
        # Triton's absolute value flushes subnormals, an instruction of its own.
        u = _lanewise(
            "{ .reg .f32 a; abs.f32 a, $1; mul.f32 a, a, 0fBFB8AA3B;"
            " ex2.approx.ftz.f32 $0, a; }",
            v,
        )
    p = jnp.full_like(u, LOG1P[0])
    for coefficient in LOG1P[1:]:
        p = p * u + coefficient
    return jnp.maximum(v, 0.0) + u * p, u


def sigmoid(z, plan):
    """Absolute error below 2^-12: an eighth of a last place of bfloat16 at z = 0.

    Where z is very negative, the error is that large all the same, so not for factors
    whose small values count, such as the slope of the softplus.
    """
    return 0.5 * _tanh(0.5 * z, plan) + 0.5


def silu(z, plan):
    """The gate z sigmoid(z): absolute error below 2^-12 |z|."""
    half = 0.5 * z
    return half * _tanh(half, plan) + half
