"""A draft that proposes what it is told, so that every acceptance pattern can be had."""

import dataclasses

import jax
import jax.numpy as jnp

from mil_jax.config import ComputeConfig, ModelConfig

from . import tiny

CONFIG = dataclasses.replace(tiny.ATTENTION, layer_types=())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposes `script[b, p]` as the token at position p of row b, whatever it reads."""

    script: jax.Array
    config: ModelConfig = dataclasses.field(default=CONFIG, metadata={"static": True})
    compute: ComputeConfig = dataclasses.field(
        default=ComputeConfig(), metadata={"static": True}
    )

    def prefill(self, tokens, num_tokens, cache, chunk=None):
        cache = dataclasses.replace(cache, lengths=cache.lengths + num_tokens)
        return jnp.zeros((tokens.shape[0], tiny.VOCAB)), cache

    def decode(self, tokens, cache, *, commit=True, last_only=False):
        places = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]
        at = jnp.minimum(cache.lengths[:, None] + places, self.script.shape[1] - 1)
        logits = jax.nn.one_hot(jnp.take_along_axis(self.script, at, 1), tiny.VOCAB)
        pending = jnp.zeros_like(cache.num_pending) if commit else cache.num_pending
        cache = dataclasses.replace(cache, num_pending=pending)
        return logits[:, -1:] if last_only else logits, cache

    def token_ids(self, index):
        return index

    def all_logits(self, logits):
        return logits
