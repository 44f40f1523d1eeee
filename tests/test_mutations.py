"""Known slips, put into the code one at a time: the named check must fail on each.

A mutation replaces text in the source of one function and runs the function so changed. If
the text is gone, the code was rewritten: write the slip anew.
"""

import dataclasses
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable

import pytest
from checks import (
    conversion,
    generation,
    meshes,
    released,
    sampling,
    sequences,
    stacking,
    stepping,
    tiny,
)

from mil_jax import sharding, surgery
from mil_jax.checkpoint import key_table
from mil_jax.generate import decode, sampler, speculative
from mil_jax.models import attention, cache, decoder, layers, mamba, mamba2, rope, ssm
from pallas_kernels.cached_attention import rotation
from pallas_kernels.cached_attention import xla as cached_attention

pytestmark = pytest.mark.usefixtures("strict_jax")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A slip, and the check that must not survive it.

    Attributes:
        name: What was done wrong.
        owner: Module or class of the function.
        function: Its name.
        edits: Pairs of text and its replacement; each text occurs once.
        check: Passes on the code as it is.
    """

    name: str
    owner: object
    function: str
    edits: tuple[tuple[str, str], ...]
    check: Callable[[], None]

    def apply(self, monkeypatch):
        original = inspect.getattr_static(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(original))
        for text, replacement in self.edits:
            assert source.count(text) == 1, f"{text!r} is not in {self.function} once"
            source = source.replace(text, replacement)
        module = sys.modules[original.__module__]
        names = {}
        exec(compile(source, module.__file__, "exec"), vars(module), names)
        changed = names[self.function]
        monkeypatch.setattr(self.owner, self.function, changed)
        for name, other in list(sys.modules.items()):
            if name.startswith("mil_jax.") and other is not self.owner:
                if getattr(other, self.function, None) is original:
                    monkeypatch.setattr(other, self.function, changed)


def slip(name, owner, function, *edits_and_check):
    *texts, check = edits_and_check
    edits = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Mutation(name, owner, function, edits, check)


def check(function, *args, **kwargs):
    return functools.partial(function, *args, **kwargs)


forward = functools.partial(check, sequences.check_forward)
packed = functools.partial(check, sequences.check_packed)
prefill = functools.partial(check, stepping.check_prefill)
steps = functools.partial(check, stepping.check_single_steps)
rollback = functools.partial(check, stepping.check_rollback)
chains = functools.partial(check, stepping.check_chains)
scanned = check(stacking.check_scanned_forward, ("mamba2",) * 3)
speculation = check(generation.check_speculation, "attention", "attention~", 2)
draws = check(sampling.check_verify_draws, sampling.SAMPLINGS["plain"])
filtered_draws = check(sampling.check_verify_draws, sampling.SAMPLINGS["both"])
filters = {
    name: check(sampling.check_filter, how) for name, how in sampling.SAMPLINGS.items()
}
Attention, Mamba, Mamba2 = attention.Attention, mamba.MambaMixer, mamba2.Mamba2Mixer
LM, Stack, Mixer = decoder.HybridLM, decoder.LayerStack, ssm.SSMMixer
B_THEN_C = "inputs.B,\n        inputs.C,"
C_THEN_B = "inputs.C,\n        inputs.B,"

MODEL_SLIPS = [
    slip(
        "rope_theta dropped",
        rope,
        "inverse_frequencies",
        "theta**exponents",
        "10000.0**exponents",
        forward("attention"),
    ),
    slip(
        "rope scaling dropped",
        rope,
        "inverse_frequencies",
        "scaling is None",
        "True",
        forward("rich"),
    ),
    slip(
        "rope pairs interleaved",
        rotation,
        "rotate",
        "jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        "(x.astype(jnp.float32)[..., i::2] for i in range(2))",
        forward("attention"),
    ),
    slip(
        "window off by one in training",
        Attention,
        "__call__",
        "(window - 1, 0)",
        "(window, 0)",
        forward("rich"),
    ),
    slip(
        "window off by one in decoding",
        cached_attention,
        "_visible",
        "ahead < window",
        "ahead <= window",
        steps("rich"),
    ),
    slip(
        "attention sees other documents",
        Attention,
        "__call__",
        "mask=mask",
        "mask=None",
        packed("attention"),
    ),
    slip(
        "attention sees a stale slot",
        cached_attention,
        "_visible",
        "ahead >= 0",
        "ahead >= -1",
        rollback("attention"),
    ),
    slip(
        "positions start anew in every step",
        rotation,
        "next_positions",
        "lengths.astype(jnp.int32)[:, None] + ",
        "jnp.zeros_like(lengths)[:, None] + ",
        steps("attention"),
    ),
    slip(
        "keys normed as queries",
        Attention,
        "_project",
        "self.k_norm(k)",
        "self.q_norm(k)",
        forward("rich"),
    ),
    slip(
        "query heads read kv heads in turn",
        cached_attention,
        "_scores",
        "q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], width)",
        "q.reshape(batch, tokens, -1, k.shape[2], width).swapaxes(2, 3)",
        prefill("attention"),
    ),
    slip(
        "bias dropped",
        layers.Linear,
        "__call__",
        "self.bias is not None",
        "False",
        forward("rich"),
    ),
    slip(
        "eps dropped", layers.RMSNorm, "__call__", "self.eps", "0.0", forward("mamba")
    ),
    slip("B and C swapped", Mamba, "scan", B_THEN_C, C_THEN_B, forward("mamba")),
    slip(
        "B and C swapped in decoding", Mamba, "step", B_THEN_C, C_THEN_B, steps("pure")
    ),
    slip(
        "x repeated as a whole",
        Mixer,
        "_convolve",
        "group=self.conv_group",
        "group=None",
        forward("mamba"),
    ),
    slip(
        "x repeated by heads",
        Mixer,
        "_convolve",
        "group=self.conv_group",
        "group=2 * self.conv_group",
        forward("mamba"),
    ),
    slip("D dropped", Mamba, "scan", "D=self.D[...]", "D=None", forward("mamba")),
    slip("gate dropped", Mamba, "scan", "z=z", "z=None", forward("mamba")),
    slip("gate dropped in decoding", Mamba, "step", "z=z", "z=None", steps("mamba")),
    slip(
        "dt bias added twice",
        Mamba,
        "scan",
        "dt_bias=self.dt_bias[...]",
        "dt_bias=2 * self.dt_bias[...]",
        forward("mamba"),
    ),
    slip("A without exp", Mamba, "_A", "jnp.exp(", "jnp.abs(", forward("mamba")),
    slip(
        "pure Mamba reads before the convolution",
        Mamba,
        "scan_inputs",
        "project(self, DT_B_C, conv_out)",
        "project(self, DT_B_C, projected.conv_in)",
        forward("pure"),
    ),
    slip(
        "state crosses documents",
        Mamba,
        "scan",
        "segment_ids=segment_ids",
        "segment_ids=None",
        packed("mamba"),
    ),
    slip(
        "Mamba-2 state crosses documents",
        Mamba2,
        "scan",
        "segment_ids=segment_ids",
        "segment_ids=None",
        packed("mamba2"),
    ),
    slip(
        "convolution crosses documents",
        Mixer,
        "_convolve",
        "segment_ids=segment_ids",
        "segment_ids=None",
        packed("mamba2"),
    ),
    slip(
        "no activation after the convolution",
        Mixer,
        "_convolve",
        'activation="silu"',
        "activation=None",
        forward("mamba2"),
    ),
    slip(
        "x and B swapped",
        Mamba2,
        "project",
        "self.x_proj, self.B_proj, self.C_proj)",
        "self.B_proj, self.x_proj, self.C_proj)",
        forward("mamba2"),
    ),
    slip(
        "norm before the gate",
        mamba2.GatedNorm,
        "__call__",
        "return gated_norm(y, z,",
        "return jax.nn.silu(z) * gated_norm(y, jnp.full_like(z, 30.0),",
        forward("mamba2"),
    ),
    slip(
        "one statistic for all heads",
        mamba2.GatedNorm,
        "__call__",
        "y.shape[-1] // self.group",
        "1",
        forward("mamba2"),
    ),
    slip(
        "stacked layers in reverse",
        decoder.Blueprint,
        "_names",
        "range(self.repeats)",
        "reversed(range(self.repeats))",
        scanned,
    ),
    slip(
        "scan runs backwards",
        Stack,
        "__call__",
        "jax.lax.scan(turn, h, states)",
        "jax.lax.scan(turn, h, states, reverse=True)",
        scanned,
    ),
    slip(
        "unstacked in reverse",
        decoder.Blueprint,
        "unstack",
        "value[i]",
        "value[-1 - i]",
        check(stacking.check_unstack, True),
    ),
]

CACHE_SLIPS = [
    slip(
        "no room for a step at the end of the cache",
        cache,
        "init_cache",
        "max_length + max_step",
        "max_length",
        stepping.check_full_cache,
    ),
    slip(
        "padding moves the state",
        ssm,
        "_mask_steps",
        "jnp.where(shaped, dt, jnp.asarray(NO_STEP, dt.dtype))",
        "dt",
        prefill("mamba"),
    ),
    slip(
        "padding enters the convolution",
        Mixer,
        "prefill",
        "take_rows(seen, num_tokens, cache.window.shape[1])",
        "seen[:, -cache.window.shape[1] :]",
        prefill("mamba2"),
    ),
    slip(
        "second prompt part starts from nothing",
        Mixer,
        "prefill",
        "cache.state, None",
        "jnp.zeros_like(cache.state), None",
        prefill("mamba"),
    ),
    slip(
        "logits of the token before the last",
        LM,
        "_prefill",
        "num_tokens - 1, 0",
        "num_tokens - 2, 0",
        prefill("attention"),
    ),
    slip(
        "layers in reverse",
        Stack,
        "layers",
        "in self.blocks",
        "in list(self.blocks)[::-1]",
        prefill("attention"),
    ),
    slip(
        "convolution forgets",
        Mixer,
        "_convolve",
        "initial_window=window",
        "initial_window=None",
        prefill("mamba"),
    ),
    slip(
        "convolution does not roll back",
        Mixer,
        "decode",
        "num_pending,\n        projected",
        "jnp.full_like(num_pending, cache.pending_window.shape[1]),\n        projected",
        rollback("mamba2"),
    ),
    slip(
        "one token too many replayed",
        Mamba,
        "step",
        "        num_pending,\n",
        "        num_pending + 1,\n",
        rollback("mamba"),
    ),
    slip(
        "one token too few replayed",
        Mamba2,
        "step",
        "        num_pending,\n",
        "        num_pending - 1,\n",
        rollback("mamba2"),
    ),
    slip(
        "commit where none was asked for",
        Mixer,
        "decode",
        "num_pending,\n        commit=commit,",
        "num_pending,\n        commit=True,",
        chains("mamba"),
    ),
    slip(
        "chained tokens overwrite pending ones",
        Mixer,
        "decode",
        "if commit else num_pending",
        "if True else num_pending",
        chains("mamba2"),
    ),
    slip(
        "keep adds up",
        cache.HybridCache,
        "keep",
        "self.lengths - self.num_pending + num_tokens",
        "self.lengths + num_tokens",
        chains("attention"),
    ),
]

GENERATION_SLIPS = [
    slip(
        "prompts read with their padding",
        decode,
        "_start",
        "prompt_lengths, cache,",
        "jnp.full_like(prompt_lengths, prompts.shape[1]), cache,",
        check(generation.check_plain, "attention"),
    ),
    slip(
        "ended rows go on",
        decode,
        "_step",
        "jnp.where(is_live, token, 0)",
        "token",
        check(generation.check_plain_eos),
    ),
    slip(
        "only the last EOS counts",
        decode,
        "is_eos",
        "found |= tokens == eos",
        "found = tokens == eos",
        check(generation.check_plain_eos),
    ),
    slip(
        "temperature multiplied",
        sampler,
        "log_probs",
        "/ sampling.temperature",
        "* sampling.temperature",
        filters["cold"],
    ),
    slip(
        "top-k keeps one too few",
        sampler,
        "log_probs",
        "logits < kth",
        "logits <= kth",
        filters["top_k"],
    ),
    slip(
        "top-p stops one too early",
        sampler,
        "log_probs",
        "jnp.cumsum(probs, axis=-1) - probs",
        "jnp.cumsum(probs, axis=-1)",
        filters["top_p"],
    ),
    slip(
        "any agreement counts, not the prefix",
        speculative,
        "_prefix_length",
        "jnp.cumprod(agrees.astype(jnp.int32), axis=1)",
        "agrees.astype(jnp.int32)",
        generation.check_verify_greedy,
    ),
    slip(
        "one too many accepted",
        speculative,
        "_prefix_length",
        "axis=1), axis=1)",
        "axis=1), axis=1).clip(0, agrees.shape[1] - 1) + 1",
        generation.check_verify_greedy,
    ),
    slip(
        "one too few accepted",
        speculative,
        "_prefix_length",
        "axis=1), axis=1)",
        "axis=1), axis=1).clip(1) - 1",
        generation.check_verify_greedy,
    ),
    slip(
        "extra token from the last place",
        speculative,
        "accept",
        "num_accepted[:, None], extra, tokens",
        "num_accepted[:, None], extra[:, -1:], tokens",
        generation.check_verify_greedy,
    ),
    slip(
        "all drafts accepted",
        speculative,
        "verify",
        "uniform < jnp.exp(ratio)",
        "uniform < 1",
        draws,
    ),
    slip(
        "extra token from p instead of p - q",
        speculative,
        "verify",
        "jnp.maximum(p - q, 0.0)",
        "p",
        draws,
    ),
    slip(
        "p and q swapped",
        speculative,
        "verify",
        "jnp.exp(ratio)",
        "jnp.exp(-ratio)",
        draws,
    ),
    slip(
        "p of the place after",
        speculative,
        "verify",
        "log_p[:, :k]",
        "log_p[:, 1:]",
        draws,
    ),
    slip(
        "draft not filtered",
        speculative,
        "verify",
        "log_probs(draft_logits, sampling)",
        "jax.nn.log_softmax(draft_logits, axis=-1)",
        filtered_draws,
    ),
    slip(
        "target not filtered",
        speculative,
        "verify",
        "log_probs(target_logits, sampling)",
        "jax.nn.log_softmax(target_logits, axis=-1)",
        filtered_draws,
    ),
    slip(
        "draft ahead by one",
        speculative,
        "_start",
        "prompt_lengths - 1, draft_cache,",
        "prompt_lengths, draft_cache,",
        speculation,
    ),
    slip(
        "target keeps one too few",
        speculative,
        "_settle",
        "target_cache.keep(kept)",
        "target_cache.keep(kept.clip(1) - 1)",
        speculation,
    ),
    slip(
        "draft keeps one too many",
        speculative,
        "_settle",
        "c.draft_cache.keep(kept)",
        "c.draft_cache.keep(kept + 1)",
        speculation,
    ),
    slip(
        "draft goes on from the wrong tokens",
        speculative,
        "_settle",
        "verdict.num_accepted[:, None] + jnp.arange(2)[None]",
        "jnp.zeros_like(verdict.num_accepted)[:, None] + jnp.arange(2)[None]",
        speculation,
    ),
    slip(
        "draft commits while it drafts",
        speculative,
        "propose",
        "commit=False",
        "commit=True",
        speculation,
    ),
    slip(
        "draft rereads its own token",
        speculative,
        "propose",
        "i + 2)",
        "i + 1)",
        speculation,
    ),
    slip(
        "answers beyond the limit",
        speculative,
        "_settle",
        "jnp.minimum(emitted, c.max_new_tokens - c.lengths)",
        "emitted",
        generation.check_limits,
    ),
    slip(
        "EOS not counted",
        speculative,
        "_until_eos",
        "first + 1, count",
        "first, count",
        generation.check_ends,
    ),
    slip(
        "EOS seen in padding",
        speculative,
        "_until_eos",
        " & (jnp.arange(size)[None] < count[:, None])",
        "",
        generation.check_ends,
    ),
]

CONVERSION_SLIPS = [
    slip(
        "channels not aligned",
        surgery,
        "aligned_channels",
        "transpose(0, 2, 1, 3)",
        "transpose(0, 1, 2, 3)",
        conversion.check_aligned,
    ),
    slip(
        "only queries aligned",
        surgery,
        "attention_to_mamba",
        'source["out_proj"][order, :]',
        'source["out_proj"]',
        conversion.check_aligned,
    ),
    slip(
        "orders swapped",
        surgery,
        "attention_to_mamba",
        'channel_order == "aligned"',
        'channel_order == "original"',
        check(conversion.check_copies, "mamba", "original"),
    ),
    slip(
        "Mamba-2's dt doubled too",
        surgery,
        "attention_to_mamba",
        'dt_init == "original" and mixer == "mamba"',
        'dt_init == "original"',
        conversion.check_dt_init,
    ),
    slip(
        "dt not doubled",
        surgery,
        "attention_to_mamba",
        '2 * fresh["dt_bias"]',
        'fresh["dt_bias"]',
        conversion.check_dt_init,
    ),
    slip(
        "kept layers sorted",
        surgery,
        "keep_layers",
        "enumerate(layers)",
        "enumerate(sorted(layers))",
        conversion.check_keep_layers,
    ),
    slip(
        "nothing is split",
        sharding,
        "named_sharding",
        "size % ways == 0",
        "False",
        check(meshes.check_shards, "mamba", fsdp=2, tensor=4),
    ),
]

ALL = [*MODEL_SLIPS, *CACHE_SLIPS, *GENERATION_SLIPS, *CONVERSION_SLIPS]


def assert_killed(check):
    with tiny.fresh_traces():
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("mutation", ALL, ids=lambda m: m.name.replace(" ", "_"))
def test_slip_is_caught(mutation, monkeypatch):
    mutation.apply(monkeypatch)
    assert_killed(mutation.check)


def test_names_are_unique():
    assert len({m.name for m in ALL}) == len(ALL)


def test_keys_and_values_swapped(monkeypatch):
    swapped = {"v_proj": "B_proj", "k_proj": "x_proj"}
    for ours, theirs in swapped.items():
        monkeypatch.setitem(surgery.ATTENTION_TO_SSM, ours, theirs)
    assert_killed(check(conversion.check_copies, "mamba2", "original"))
    assert_killed(check(conversion.check_aligned, "mamba"))


@pytest.mark.parametrize("axis", ["embed", "d_inner", "heads", "mlp"])
def test_axis_not_split(axis, monkeypatch):
    monkeypatch.setitem(sharding.LOGICAL_AXIS_RULES, axis, None)
    assert_killed(check(meshes.check_shards, "mamba", fsdp=2, tensor=4))


def replace_row(monkeypatch, kind, key, **changes):
    rows = key_table._MIXERS[kind]
    changed = tuple(
        dataclasses.replace(row, **changes) if row.key == key else row for row in rows
    )
    assert changed != rows
    monkeypatch.setitem(key_table._MIXERS, kind, changed)


def test_dt_bias_imported_once(monkeypatch):
    replace_row(
        monkeypatch, "mamba", "mamba.dt_proj.bias", transform=key_table.IDENTITY
    )
    assert_killed(check(released.check_released, "mamba"))


def test_rows_of_in_proj_in_another_order(monkeypatch):
    names = ("z_proj", "B_proj", "x_proj", "C_proj", "dt_proj")
    params = tuple(f"mamba2.{name}.kernel" for name in names)
    replace_row(monkeypatch, "mamba2", "mamba.in_proj.weight", params=params)
    assert_killed(check(released.check_released, "mamba2"))
