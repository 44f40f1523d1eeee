"""Parameters, linear maps, embedding and norm: the parts every layer is made of."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mil_jax import sharding
from mil_jax.config import ComputeConfig
from pallas_kernels.multi_step.columns import Columns
from pallas_kernels.narrow_product import is_kept_by_output, narrow_product
from pallas_kernels.norms import rms_norm
from pallas_kernels.residual_norm.api import residual_norm

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

# Standard deviation of Llama's initialisation (`initializer_range`).
normal_init = jax.nn.initializers.normal(0.02)


def uniform_init(bound: float) -> Initializer:
    """Returns an initialiser that draws from U(-bound, bound)."""

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def make_param(
    init: Initializer, shape: Sequence[int], axes: tuple[str, ...], rngs: nnx.Rngs
) -> nnx.Param:
    """Returns a float32 parameter that carries its logical axis names.

    Args:
        init: Called with a key, the shape and float32.
        shape: One size per dimension.
        axes: One logical axis name per dimension (see `mil_jax.sharding`).
        rngs: Source of the key.
    """
    value = init(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, logical_axes=axes)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` with the kernel cast to `dtype`; kernel is [in, out]."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        dtype: str,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        init: Initializer = normal_init,
    ):
        self.kernel = make_param(init, shape, axes, rngs)
        self.bias = (
            make_param(jax.nn.initializers.zeros, shape[1:], axes[1:], rngs)
            if use_bias
            else None
        )
        self.dtype = dtype

    def __call__(
        self, x: "Float[Array, '*B I'] | Unnormed", residual: jax.Array | None = None
    ) -> Float[Array, "*B O"]:
        """Returns the product in `dtype`, added to a residual stream if one is given."""
        y = normed(x).astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)
        return y if residual is None else residual + y


def product_of_all(x: Float[Array, "*B I"], *linears: Linear) -> Float[Array, "*B O"]:
    """Returns the products of x with linear maps without bias, side by side.

    It is one product for all, whose gradients are single products too.
    """
    dtype = linears[0].dtype
    kernels = [linear.kernel[...].astype(dtype) for linear in linears]
    return x.astype(dtype) @ jnp.concatenate(kernels, axis=1)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How an array for decoding arises from those of some `Linear`s.

    Attributes:
        widths: Of the outputs that lie side by side.
        is_transposed: Whether it is kept as [out, in], as tied embeddings are.
    """

    widths: tuple[int, ...]
    is_transposed: bool = False

    def part_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Returns the parts' shapes for the array's."""
        outer = shape[1:] if self.is_transposed else shape[:-1]
        return [(*outer, width) for width in self.widths]

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Returns the array that holds the parts."""
        value = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return value.T if self.is_transposed else value

    def split(self, value: jax.Array) -> list[jax.Array]:
        """Inverse of `join`."""
        return self.split_outputs(value.T if self.is_transposed else value)

    def split_outputs(self, y: Float[Array, "*B O"]) -> list[jax.Array]:
        """Returns the parts of products with the array."""
        return jnp.split(y, np.cumsum(self.widths[:-1]), axis=-1)


class PackedLinear(nnx.Module):
    """Linear maps of one input as a single product, laid out for few tokens."""

    def __init__(
        self,
        kernel: nnx.Param,
        bias: nnx.Param | None,
        packing: Packing,
        dtype: str,
    ):
        self.kernel = kernel
        self.bias = bias
        self.packing = packing
        self.dtype = dtype

    @classmethod
    def of_linears(
        cls, linears: Sequence[Linear], may_transpose: bool
    ) -> "PackedLinear":
        """Returns the maps side by side, as [out, in] where a kernel wants them so."""
        kernels = [linear.kernel for linear in linears]
        widths = tuple(kernel.shape[1] for kernel in kernels)
        by_output = is_kept_by_output(sum(widths), kernels[0].shape[0])
        packing = Packing(widths, may_transpose and by_output)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = _pack_params(biases, Packing(widths)) if biases else None
        return cls(_pack_params(kernels, packing), bias, packing, linears[0].dtype)

    @property
    def is_transposed(self) -> bool:
        """Whether the kernel is [out, in]."""
        return self.packing.is_transposed

    @property
    def by_output(self) -> Float[Array, "O I"]:
        """The kernel as [out, in]."""
        kernel = self.kernel[...]
        return kernel if self.is_transposed else kernel.T

    def __call__(
        self, x: "Float[Array, 'B L I'] | Unnormed", residual: jax.Array | None = None
    ) -> Float[Array, "B L O"]:
        """Returns all products side by side, in `dtype`, added to a residual stream."""
        if not self.is_transposed:
            y = multiply(normed(x).astype(self.dtype), self.kernel[...], False)
        else:
            y = self._narrow(x, residual if self.bias is None else None)
            if self.bias is None:
                return y
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)
        return y if residual is None else residual + y

    def _narrow(
        self, x: "Float[Array, 'B L I'] | Unnormed", residual: jax.Array | None
    ) -> Float[Array, "B L O"]:
        """Returns the product without bias; its kernel is [out, in]."""
        norm = {}
        if isinstance(x, Unnormed):
            norm = {"scale": x.norm.scale[...], "eps": x.norm.eps}
        mesh = sharding.current_mesh()
        return narrow_product(
            (x.h if norm else x).astype(self.dtype),
            self.kernel[...],
            residual=residual,
            # The compiler has no rule for splitting a kernel: it would gather the weights.
            implementation=None if mesh is None or mesh.size == 1 else "xla",
            **norm,
        )


def multiply(
    x: Float[Array, "*B I"],
    kernel: Float[Array, "..."],
    transposed: bool,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "*B O"]:
    """Returns `x @ kernel` in the dtype of `x`, or of `kernel.T` if it is transposed."""
    kernel = kernel.astype(x.dtype)
    contracted = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    return jax.lax.dot_general(x, kernel, contracted, preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_float32(
    x: Float[Array, "*B I"], kernel: Float[Array, "..."], transposed: bool
) -> Float[Array, "*B O"]:
    """Returns `multiply` summed and kept in float32; gradients are in the dtype of `x`.

    Left alone, the result's float32 gradient would be multiplied with a float32 copy of the
    kernel, at half the speed.
    """
    return multiply(x, kernel, transposed, jnp.float32)


def _multiply_forward(x, kernel, transposed):
    return multiply_float32(x, kernel, transposed), (x, kernel)


def _multiply_backward(transposed, inputs, gradient):
    product = functools.partial(multiply, transposed=transposed)
    return jax.vjp(product, *inputs)[1](gradient.astype(inputs[0].dtype))


multiply_float32.defvjp(_multiply_forward, _multiply_backward)


def _pack_params(params: Sequence[nnx.Param], packing: Packing) -> nnx.Param:
    *outer, last = params[0].get_metadata()["logical_axes"]
    last = last if len(params) == 1 else "packed"
    axes = (last, *outer) if packing.is_transposed else (*outer, last)
    return nnx.Param(
        packing.join([param[...] for param in params]),
        logical_axes=axes,
        packing=packing,
    )


def pack(
    owner: nnx.Module,
    compute: ComputeConfig,
    *groups: tuple[str, ...],
    may_transpose: bool = True,
) -> None:
    """Lays out an owner's projections as `compute.layout` says.

    For decoding, the projections of a group, which read the same input, become one
    attribute whose name joins theirs by "+". Then read them by `project`, or call it.

    Args:
        owner: Has the projections as attributes.
        compute: Says how.
        *groups: Names of projections.
        may_transpose: Whether products that are called may be kept as [out, in].
    """
    if compute.layout == "train":
        return
    for names in groups:
        linears = [getattr(owner, name) for name in names]
        packed = PackedLinear.of_linears(linears, may_transpose)
        for name in names:
            delattr(owner, name)
        setattr(owner, "+".join(names), packed)


def project(
    owner: nnx.Module,
    names: tuple[str, ...],
    x: "Float[Array, 'B L I'] | Unnormed",
) -> list[jax.Array]:
    """Returns the products of x with the projections of one group, in either layout."""
    packed = getattr(owner, "+".join(names), None)
    if packed is None:
        x = normed(x)
        return [getattr(owner, name)(x) for name in names]
    return packed.packing.split_outputs(packed(x))


def project_columns(
    owner: nnx.Module,
    names: tuple[str, ...],
    x: "Float[Array, 'B L I'] | Unnormed",
) -> list[jax.Array | Columns]:
    """Returns what `project` does, uncut where one product holds it all."""
    packed = getattr(owner, "+".join(names), None)
    if packed is None:
        return project(owner, names, x)
    y, widths = packed(x), packed.packing.widths
    starts = [sum(widths[:i]) for i in range(len(widths))]
    parts = zip(starts, widths, strict=True)
    return [Columns(y, start, (width,)) for start, width in parts]


class Embedding(nnx.Module):
    """Token table [V, D]; with tied embeddings also the language-model head."""

    def __init__(self, vocab_size: int, d_model: int, *, dtype: str, rngs: nnx.Rngs):
        self.embedding = make_param(
            normal_init, (vocab_size, d_model), ("vocab", "embed"), rngs
        )
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Looks rows up."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis, statistics in float32."""

    def __init__(self, size: int, *, axis: str, eps: float, rngs: nnx.Rngs):
        self.scale = make_param(jax.nn.initializers.ones, (size,), (axis,), rngs)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the normalised input in the dtype of `x`."""
        return rms_norm(x, self.scale[...], self.eps)

    def add(
        self, x: Float[Array, "B L D"], delta: Float[Array, "B L D"] | None = None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """Returns `x + delta`, or `x`, and the norm of it, as one pass over memory.

        What uses `x` afterwards should take the first result, for the backward pass's sake.
        """

        def run(scale: jax.Array, rows: tuple) -> tuple[jax.Array, jax.Array]:
            return residual_norm(*rows, scale, eps=self.eps)

        return sharding.by_rows(run, self.scale[...], (x, delta))


class Unnormed(NamedTuple):
    """An input whose norm is up to the product that reads it.

    Attributes:
        h: Before the norm.
        norm: Applied to h by the product, or before it.
    """

    h: Float[Array, "B L D"]
    norm: RMSNorm


def normed(x: Float[Array, "*B D"] | Unnormed) -> Float[Array, "*B D"]:
    """Returns the input after its norm."""
    return x.norm(x.h) if isinstance(x, Unnormed) else x
