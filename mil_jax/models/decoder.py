"""Decoder layers, the stack, the language model, and how weights become a model."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Primitive
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mil_jax import sharding
from mil_jax.array_types import Params
from mil_jax.config import ComputeConfig, ModelConfig
from mil_jax.errors import UserError
from mil_jax.models import rope
from mil_jax.models.attention import Attention
from mil_jax.models.cache import HybridCache, KVCache, SSMCache
from mil_jax.models.layers import (
    Embedding,
    Linear,
    PackedLinear,
    Packing,
    RMSNorm,
    multiply_float32,
    pack,
)
from mil_jax.models.mamba import MambaMixer
from mil_jax.models.mamba2 import Mamba2Mixer
from mil_jax.models.mlp import MLP

# Read in float32 by the recurrence, so stored in float32 whatever `param_dtype` is.
FLOAT32_NAMES = (".A_log", ".D", ".dt_bias")

# The name of a mixer is part of its parameters' names, which filters rely on.
MIXERS = {
    "attention": ("attn", Attention),
    "mamba": ("mamba", MambaMixer),
    "mamba2": ("mamba2", Mamba2Mixer),
}


class DecoderLayer(nnx.Module):
    """`h += mixer(norm(h)); h += mlp(norm(h))`, the MLP left out where d_ff is 0."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        kind: str,
        *,
        rngs: nnx.Rngs,
    ):
        norm = functools.partial(
            RMSNorm, config.d_model, axis="embed", eps=config.rms_norm_eps, rngs=rngs
        )
        self.kind = kind
        self.input_norm = norm()
        name, mixer = MIXERS[kind]
        setattr(self, name, mixer(config, compute, rngs=rngs))
        self.mlp_norm = norm() if config.d_ff else None
        self.mlp = MLP(config, compute, rngs=rngs) if config.d_ff else None

    @property
    def mixer(self) -> Attention | MambaMixer | Mamba2Mixer:
        """The layer's attention or state-space mixer."""
        return getattr(self, MIXERS[self.kind][0])

    def __call__(
        self,
        h: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None,
    ) -> Float[Array, "B L D"]:
        """Runs whole sequences."""
        h, u = self.input_norm.add(h)
        if self.kind == "attention":
            mixed = self.mixer(u, positions, segment_ids)
        else:
            mixed = self.mixer(u, segment_ids)
        if self.mlp is None:
            return h + mixed
        h, u = self.mlp_norm.add(h, mixed)
        return h + self.mlp(u)

    def prefill(
        self,
        h: Float[Array, "B L D"],
        cache: KVCache | SSMCache,
        lengths: Int[Array, "B"],
        num_tokens: Int[Array, "B"],
    ) -> tuple[Float[Array, "B L D"], KVCache | SSMCache]:
        """Consumes and commits `num_tokens` tokens per row."""
        u = self.input_norm(h)
        if self.kind == "attention":
            mixed, cache = self.mixer.cached(u, cache, lengths)
        else:
            mixed, cache = self.mixer.prefill(u, cache, num_tokens)
        return self._feed_forward(h + mixed), cache

    def decode(
        self,
        h: Float[Array, "B T D"],
        cache: KVCache | SSMCache,
        lengths: Int[Array, "B"],
        num_pending: Int[Array, "B"],
        *,
        commit: bool,
    ) -> tuple[Float[Array, "B T D"], KVCache | SSMCache]:
        """Runs T tokens that may be taken back."""
        u = self.input_norm(h)
        if self.kind == "attention":
            mixed, cache = self.mixer.cached(u, cache, lengths)
        else:
            mixed, cache = self.mixer.decode(u, cache, num_pending, commit=commit)
        return self._feed_forward(h + mixed), cache

    def _feed_forward(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return h if self.mlp is None else h + self.mlp.of_norm(h, self.mlp_norm)


# Equal layers are traced once, though the compiler sees each. What is traced depends on the
# mesh, so it is an argument.
@functools.partial(jax.jit, static_argnames="mesh")
def _prefill_layer(
    layer: DecoderLayer, *args: object, mesh: Mesh | None
) -> tuple[jax.Array, KVCache | SSMCache]:
    del mesh
    return layer.prefill(*args)


@functools.partial(jax.jit, static_argnames=("commit", "mesh"))
def _decode_layer(
    layer: DecoderLayer, *args: object, commit: bool, mesh: Mesh | None
) -> tuple[jax.Array, KVCache | SSMCache]:
    del mesh
    return layer.decode(*args, commit=commit)


class LayerStack(nnx.Module):
    """n layers as `repeats` turns through `period` different ones.

    Where `repeats > 1`, each block's weights carry a leading axis of that size and training
    scans over it, which compiles one period instead of n layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        period: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            DecoderLayer(config, compute, kind, rngs=rngs)
            for kind in config.layer_types[:period]
        )
        self.repeats = config.n_layers // period
        self.remat = compute.remat
        self.keeps_products = compute.remat_keeps == "products"

    def __call__(
        self,
        h: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None,
    ) -> Float[Array, "B L D"]:
        """Runs whole sequences through all layers."""

        def run(h: jax.Array, weights: nnx.State, graphdef: nnx.GraphDef) -> jax.Array:
            layer = nnx.merge(graphdef, weights)
            h = layer(h, positions, segment_ids)
            return sharding.constrain(h, ("batch", "length", None))

        if self.remat:
            policy = _is_product if self.keeps_products else None
            run = jax.checkpoint(run, static_argnums=(2,), policy=policy)
        split = [nnx.split(block) for block in self.blocks]
        graphdefs = [graphdef for graphdef, _ in split]

        def turn(h: jax.Array, states: list[nnx.State]) -> tuple[jax.Array, None]:
            for graphdef, state in zip(graphdefs, states, strict=True):
                h = run(h, state, graphdef)
            return h, None

        states = [state for _, state in split]
        if self.repeats == 1:
            return turn(h, states)[0]
        return jax.lax.scan(turn, h, states)[0]

    def layers(self) -> Iterator[DecoderLayer]:
        """Yields the n layers in order."""
        for turn in range(self.repeats):
            for block in self.blocks:
                if self.repeats == 1:
                    yield block
                    continue
                graphdef, state = nnx.split(block)
                sliced = jax.tree.map(lambda leaf, turn=turn: leaf[turn], state)
                yield nnx.merge(graphdef, sliced)


def _is_product(primitive: Primitive, *_: object, **__: object) -> bool:
    """Whether remat stores the outputs: of matrix products, kernels and attention."""
    name = primitive.name
    is_kernel = name in ("custom_vjp_call", "pallas_call", "remat_opt")
    return name == "dot_general" or is_kernel or "attention" in name


class HybridLM(nnx.Module):
    """A decoder-only language model whose layers mix with attention, Mamba or Mamba-2."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig,
        period: int,
        *,
        rngs: nnx.Rngs,
    ):
        d, v = config.d_model, config.vocab_size
        self.embed = Embedding(v, d, dtype=compute.dtype, rngs=rngs)
        self.layers = LayerStack(config, compute, period, rngs=rngs)
        self.final_norm = RMSNorm(d, axis="embed", eps=config.rms_norm_eps, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear((d, v), ("embed", "vocab"), dtype=compute.dtype, rngs=rngs)
        )
        if self.lm_head is not None:
            pack(self, compute, ("lm_head",))
        self.vocab: nnx.Variable | None = None
        self.config = config
        self.compute = compute

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Returns next-token logits in float32 for whole sequences."""
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns the normalised last hidden states, from which `logits` follow.

        Args:
            tokens: Token ids.
            segment_ids: Equal for the tokens of one document, which see nothing of others:
                attention is masked, states and convolutions restart. None: one document a
                row. Ids do not recur within a row; padding is a document of its own.
        """
        if segment_ids is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
            )
        else:
            positions = rope.segment_positions(segment_ids)
        h = sharding.constrain(self.embed(tokens), ("batch", "length", None))
        return self.final_norm(self.layers(h, positions, segment_ids))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns float32 logits."""
        hidden = hidden.astype(self.compute.dtype)
        is_transposed = getattr(self.lm_head, "is_transposed", self.lm_head is None)
        owner = self.embed.embedding if self.lm_head is None else self.lm_head.kernel
        return multiply_float32(hidden, owner[...], is_transposed)

    def with_vocab(self, ids: Sequence[int] | np.ndarray) -> "HybridLM":
        """Returns the model with a head for these tokens only, which is read faster.

        It reads all tokens, but its `logits` are of those, in their order: see `token_ids`
        and `all_logits`. The rest of the weights is shared. Such a model can only draft.

        Raises:
            UserError: No token, one twice, one that the model does not have, or a model
                whose head was reduced before.
        """
        ids = np.asarray(ids)
        if self.vocab is not None:
            raise UserError(
                "this model's head was reduced before; reduce the whole one"
            )
        is_known = ids.size and ids.min() >= 0 and ids.max() < self.config.vocab_size
        if not is_known or np.unique(ids).size < ids.size:
            raise UserError(
                f"a reduced head needs tokens below {self.config.vocab_size}, each once"
            )
        model = nnx.merge(*nnx.split(self))
        kernel = self.embed.embedding[...]
        packing = Packing((len(ids),), True)
        if self.lm_head is not None:
            kernel = self.lm_head.kernel[...]
            packing = Packing(
                (len(ids),), getattr(self.lm_head, "is_transposed", False)
            )
        axis = 0 if packing.is_transposed else 1
        kernel = jnp.take(kernel, jnp.asarray(ids), axis=axis)
        head = PackedLinear(nnx.Param(kernel), None, packing, self.compute.dtype)
        model.lm_head = nnx.data(head)
        model.vocab = nnx.data(nnx.Variable(jnp.asarray(ids, jnp.int32)))
        return model

    def check_whole_head(self) -> None:
        """Checks that the model can answer itself.

        Raises:
            UserError: Its head was reduced.
        """
        if self.vocab is not None:
            raise UserError(
                "a model with a reduced head can only draft; decode with the whole one"
            )

    def token_ids(self, index: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Returns the tokens at these places of `logits`."""
        return index if self.vocab is None else jnp.take(self.vocab[...], index)

    def all_logits(self, logits: Float[Array, "*B U"]) -> Float[Array, "*B V"]:
        """Returns logits of all tokens: -inf for those that the head leaves out."""
        if self.vocab is None:
            return logits
        shape = (*logits.shape[:-1], self.config.vocab_size)
        return jnp.full(shape, -jnp.inf).at[..., self.vocab[...]].set(logits)

    def prefill(
        self,
        tokens: Int[Array, "B L"],
        num_tokens: Int[Array, "B"],
        cache: HybridCache,
        *,
        chunk: int | None = None,
    ) -> tuple[Float[Array, "B V"], HybridCache]:
        """Consumes the first `num_tokens[b]` of each row and commits them.

        Needs a cache without pending tokens (a new one, or one after another prefill), with
        slots for all L tokens of a row, padding included, after those it holds.

        Args:
            tokens: Continuation of each row, padded on the right.
            num_tokens: How many of them count.
            cache: Without pending tokens.
            chunk: Read so many positions at a time, which bounds the memory. The slots must
                then hold L rounded up to a multiple of it.

        Returns:
            Logits after each row's last token, and the cache. A row with no token has
            meaningless logits and an unchanged cache.
        """
        size = tokens.shape[1]
        if chunk is None or size <= chunk:
            last, cache = self._prefill(tokens, num_tokens, cache)
            return self.logits(last), cache
        count = -(-size // chunk)
        tokens = jnp.pad(tokens, ((0, 0), (0, count * chunk - size)))

        def read(i: jax.Array, carry: tuple) -> tuple:
            before, cache = carry
            part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
            left = jnp.clip(num_tokens - i * chunk, 0, chunk)
            last, cache = self._prefill(part, left, cache)
            return jnp.where((left > 0)[:, None], last, before), cache

        nothing = jnp.zeros((tokens.shape[0], self.config.d_model), self.compute.dtype)
        last, cache = jax.lax.fori_loop(0, count, read, (nothing, cache))
        return self.logits(last), cache

    def _prefill(
        self,
        tokens: Int[Array, "B L"],
        num_tokens: Int[Array, "B"],
        cache: HybridCache,
    ) -> tuple[Float[Array, "B D"], HybridCache]:
        """Returns the hidden state after each row's last token."""
        h = self.embed(tokens)
        layers = []
        for layer, layer_cache in zip(self.layers.layers(), cache.layers, strict=True):
            h, layer_cache = _prefill_layer(
                layer,
                h,
                layer_cache,
                cache.lengths,
                num_tokens,
                mesh=sharding.current_mesh(),
            )
            layers.append(layer_cache)
        last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
        h = self.final_norm(jnp.take_along_axis(h, last, axis=1))
        cache = dataclasses.replace(
            cache, layers=tuple(layers), lengths=cache.lengths + num_tokens
        )
        return h[:, 0], cache

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: HybridCache,
        *,
        commit: bool = True,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B T V"], HybridCache]:
        """Runs T tokens after the kept ones; the caller then says how many to `keep`.

        Args:
            tokens: Continuation of each row.
            cache: With `num_pending` accepted tokens after its committed state.
            commit: Advance the committed state over those tokens first (the rule). False
                leaves it, so that tokens given in several calls can be taken back together;
                they must fit into the cache's `max_step`.
            last_only: Return the logits after the last token only, [B, 1, V].

        Returns:
            Logits after each of the T tokens, float32, and the cache with the new tokens
            written but not yet counted: follow with `cache.keep(n)`, where n counts from
            the committed state.
        """
        h = self.embed(tokens)
        layers = []
        for layer, layer_cache in zip(self.layers.layers(), cache.layers, strict=True):
            h, layer_cache = _decode_layer(
                layer,
                h,
                layer_cache,
                cache.lengths,
                cache.num_pending,
                commit=commit,
                mesh=sharding.current_mesh(),
            )
            layers.append(layer_cache)
        if last_only:
            h = h[:, -1:]
        pending = jnp.zeros_like(cache.num_pending) if commit else cache.num_pending
        cache = dataclasses.replace(cache, layers=tuple(layers), num_pending=pending)
        return self.logits(self.final_norm(h)), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model whose modules were walked through once: cheap to hand to jitted programs.

    Handing over a `HybridLM` takes milliseconds each time, as many as decoding a token.
    """

    arrays: tuple[jax.Array, ...]
    structure: "_Structure" = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.structure.config

    @property
    def compute(self) -> ComputeConfig:
        """How it runs."""
        return self.structure.compute


@dataclasses.dataclass(frozen=True, eq=False)
class _Structure:
    """All of a model but its arrays; equal only to itself, so quick to compare."""

    tree: jax.tree_util.PyTreeDef
    config: ModelConfig
    compute: ComputeConfig


_structures: dict[jax.tree_util.PyTreeDef, _Structure] = {}


def freeze(model: HybridLM | Frozen) -> Frozen:
    """Returns the model in the form that is handed over quickly."""
    if isinstance(model, Frozen):
        return model
    arrays, tree = jax.tree.flatten(model)
    structure = _Structure(tree, model.config, model.compute)
    return Frozen(tuple(arrays), _structures.setdefault(tree, structure))


def thaw(model: HybridLM | Frozen) -> HybridLM:
    """Inverse of `freeze`; cheap while tracing."""
    if isinstance(model, Frozen):
        return jax.tree.unflatten(model.structure.tree, model.arrays)
    return model


def find_period(layer_types: tuple[str, ...]) -> int:
    """Returns the smallest p dividing n with layer_types[i] == layer_types[i % p]."""
    n = len(layer_types)
    for p in range(1, n + 1):
        if n % p == 0 and layer_types == layer_types[:p] * (n // p):
            return p
    return n


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without weights, and the map from `Params` to the weights it holds.

    A running model's weights are a flat dict as `Params` is, but some share an entry. Layers
    that are scanned do: "layers.1::4.mlp.up_proj.kernel" stacks layers 1, 5, 9, ... So do
    projections laid out for decoding: "layers.1.mlp.gate_proj+up_proj.kernel" holds two,
    side by side.
    """

    config: ModelConfig
    compute: ComputeConfig
    period: int
    graphdef: nnx.GraphDef
    state: nnx.State  # abstract, for structure and metadata

    @classmethod
    def create(cls, config: ModelConfig, compute: ComputeConfig) -> "Blueprint":
        """Traces the model's structure; no weight is allocated.

        Args:
            config: Architecture.
            compute: How to run.
        """
        scanned = find_period(config.layer_types)
        period = scanned if compute.is_scanned else config.n_layers
        abstract = nnx.eval_shape(
            lambda: HybridLM(config, compute, period, rngs=nnx.Rngs(0))
        )
        graphdef, state = nnx.split(abstract)
        return cls(config, compute, period, graphdef, state)

    @property
    def repeats(self) -> int:
        """Layers per stacked entry."""
        return self.config.n_layers // self.period

    def model(self, weights: Mapping[str, jax.Array]) -> HybridLM:
        """Returns the model that holds these weights; cheap, also while tracing."""
        leaves = []
        for path, variable in nnx.to_flat_state(self.state):
            leaves.append((path, variable.replace(weights[self._key(path)])))
        return nnx.merge(self.graphdef, nnx.from_flat_state(leaves))

    def logical_axes(self) -> dict[str, tuple[str, ...]]:
        """Returns the axis names of every weight."""
        axes = {}
        for path, variable in nnx.to_flat_state(self.state):
            key = self._key(path)
            stacked = ("layers",) if self._is_stacked(key) else ()
            axes[key] = stacked + variable.get_metadata()["logical_axes"]
        return axes

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and storage dtype of every weight."""
        shapes = {}
        for path, variable in nnx.to_flat_state(self.state):
            key = self._key(path)
            stacked = (self.repeats,) if self._is_stacked(key) else ()
            shape = stacked + variable.get_value().shape
            shapes[key] = jax.ShapeDtypeStruct(shape, self.storage_dtype(key))
        return shapes

    def storage_dtype(self, key: str) -> jnp.dtype:
        """Returns the dtype in which an untrained weight is kept."""
        is_float32 = key.endswith(FLOAT32_NAMES)
        return jnp.dtype(jnp.float32 if is_float32 else self.compute.param_dtype)

    def cast_kernels(self, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns weights with kernels in the dtype in which they are multiplied.

        Each product casts its kernel anyway, and again where it is recomputed.
        """
        dtype = self.compute.dtype
        return {
            key: value.astype(dtype) if key.endswith(".kernel") else value
            for key, value in weights.items()
        }

    def shardings(self, mesh: Mesh) -> dict[str, jax.sharding.NamedSharding]:
        """Returns the placement of every weight."""
        shapes = self.abstract()
        return {
            key: sharding.named_sharding(mesh, axes, shapes[key].shape)
            for key, axes in self.logical_axes().items()
        }

    def place(
        self,
        params: Params,
        mesh: Mesh | None = None,
        *,
        dtype_of: Callable[[str], jnp.dtype] | None = None,
    ) -> dict[str, jax.Array]:
        """Returns per-layer `params` as the model's weights on the mesh's devices.

        One weight is converted at a time, so that no second copy of the model arises.

        Args:
            params: Every tensor of the model, exactly.
            mesh: Devices; None takes the default device.
            dtype_of: Storage dtype by name; default `storage_dtype`.

        Raises:
            UserError: A tensor is missing, unknown or of another shape.
        """
        dtype_of = dtype_of or self.storage_dtype
        shapes = self.abstract()
        placements = self.shardings(mesh) if mesh is not None else {}
        self._check_names(params)
        packings = self._packings()
        weights = {}
        for key, expected in shapes.items():
            packing = packings.get(key)
            names = self._names(key)
            parts = [params[name] for name in names]
            wanted = [expected.shape] * len(names)
            if self._is_stacked(key):
                wanted = [expected.shape[1:]] * len(names)
            elif packing is not None:
                wanted = packing.part_shapes(expected.shape)
            for name, part, shape in zip(names, parts, wanted, strict=True):
                if part.shape != shape:
                    raise UserError(
                        f"{name} has shape {part.shape}; this model needs {shape}"
                    )
            dtype, placement = dtype_of(key), placements.get(key)
            if packing is not None:
                value = packing.join([jnp.asarray(part, dtype) for part in parts])
                weights[key] = jax.device_put(value, placement) if placement else value
            else:
                weights[key] = _stack_on_device(
                    parts, self._is_stacked(key), dtype, placement
                )
        return weights

    def unstack(self, weights: Mapping[str, jax.Array]) -> Params:
        """Returns weights (all of the model's, or some) as per-layer `Params`."""
        params: Params = {}
        packings = self._packings()
        for key, value in weights.items():
            names = self._names(key)
            if self._is_stacked(key):
                params |= {name: value[i] for i, name in enumerate(names)}
            elif key in packings:
                params |= zip(names, packings[key].split(value), strict=True)
            else:
                params[key] = value
        return params

    def stack(self, params: Params) -> dict[str, jax.Array]:
        """Inverse of `unstack` for any subset of weights it was given."""
        weights = {}
        packings = self._packings()
        for key in self.abstract():
            names = self._names(key)
            if names[0] not in params:
                continue
            parts = [params[name] for name in names]
            if key in packings:
                weights[key] = packings[key].join(parts)
            else:
                weights[key] = jnp.stack(parts) if self._is_stacked(key) else parts[0]
        return weights

    def _packings(self) -> dict[str, Packing]:
        """Returns how weights that are laid out for decoding arise."""
        packings = {}
        for path, variable in nnx.to_flat_state(self.state):
            packing = variable.get_metadata().get("packing")
            if packing is not None:
                packings[self._key(path)] = packing
        return packings

    def _check_names(self, params: Params) -> None:
        expected = {name for key in self.abstract() for name in self._names(key)}
        if missing := sorted(expected - set(params)):
            raise UserError(
                f"weight {missing[0]} is missing ({len(missing)} in all); the weights "
                "do not belong to this model's config"
            )
        if unknown := sorted(set(params) - expected):
            raise UserError(
                f"weight {unknown[0]} is unknown ({len(unknown)} in all); the weights "
                "do not belong to this model's config"
            )

    def _is_stacked(self, key: str) -> bool:
        return "::" in key

    def _key(self, path: tuple[str | int, ...]) -> str:
        """Returns the weight's name for a path into the module tree."""
        if path[0] != "layers":
            return ".".join(map(str, path))
        _, _, block, *rest = path  # ("layers", "blocks", j, ...)
        index = f"{block}::{self.period}" if self.repeats > 1 else f"{block}"
        return ".".join(["layers", index, *map(str, rest)])

    def _names(self, key: str) -> list[str]:
        """Returns the per-layer names that a weight's entry stands for."""
        if "+" in key:
            *outer, packed, leaf = key.split(".")
            return [".".join((*outer, name, leaf)) for name in packed.split("+")]
        match = re.fullmatch(r"layers\.(\d+)::(\d+)\.(.*)", key)
        if match is None:
            return [key]
        first, period, rest = int(match[1]), int(match[2]), match[3]
        return [
            f"layers.{first + turn * period}.{rest}" for turn in range(self.repeats)
        ]


def _stack_on_device(
    parts: list[jax.Array | np.ndarray],
    is_stacked: bool,
    dtype: jnp.dtype,
    placement: jax.sharding.Sharding | None,
) -> jax.Array:
    if all(isinstance(part, np.ndarray) for part in parts):
        # Host arrays are joined on the host, so that a device sees only its own shard.
        value = np.stack(parts) if is_stacked else parts[0]
        value = np.asarray(value, dtype)
    else:
        value = jnp.stack(parts) if is_stacked else jnp.asarray(parts[0])
        value = value.astype(dtype)
    return jax.device_put(value, placement) if placement else jnp.asarray(value)


def build(
    config: ModelConfig,
    params: Params,
    compute: ComputeConfig,
    mesh: Mesh | None = None,
) -> HybridLM:
    """Returns a running model with `params` on the mesh's devices."""
    blueprint = Blueprint.create(config, compute)
    return blueprint.model(blueprint.place(params, mesh))


def init_layer(
    config: ModelConfig, kind: str, key: jax.Array, dtype: str = "float32"
) -> Params:
    """Returns fresh parameters of one layer, named without "layers.{i}."."""
    return _init_layer_fn(config, kind, dtype)(key)


@functools.cache
def _init_layer_fn(
    config: ModelConfig, kind: str, dtype: str
) -> Callable[[jax.Array], Params]:
    def init(key: jax.Array) -> Params:
        rngs = nnx.Rngs(params=key)
        layer = DecoderLayer(config, ComputeConfig(), kind, rngs=rngs)
        return _flat_state(layer, dtype)

    return jax.jit(init)


def init_params(config: ModelConfig, key: jax.Array, dtype: str = "float32") -> Params:
    """Returns fresh parameters of a whole model, Llama's initialisation.

    Args:
        config: Architecture.
        key: Of all draws.
        dtype: Storage; what the recurrence reads is float32 nevertheless.
    """
    outer_key, layers_key = jax.random.split(key)

    def outer(key: jax.Array) -> Params:
        empty = dataclasses.replace(config, layer_types=())
        rngs = nnx.Rngs(params=key)
        return _flat_state(HybridLM(empty, ComputeConfig(), 1, rngs=rngs), dtype)

    params: Params = dict(jax.jit(outer)(outer_key))
    for i, kind in enumerate(config.layer_types):
        layer = init_layer(config, kind, jax.random.fold_in(layers_key, i), dtype)
        params |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    return params


def _flat_state(module: nnx.Module, dtype: str) -> Params:
    flat = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = ".".join(map(str, path))
        is_float32 = f".{name}".endswith(FLOAT32_NAMES)
        flat[name] = leaf.get_value().astype("float32" if is_float32 else dtype)
    return flat
