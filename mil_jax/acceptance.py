"""What speculation gains on a pair of models, and tables of many such measurements."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mil_jax.generate import speculative
from mil_jax.generate.sampler import Sampling
from mil_jax.models import decoder
from mil_jax.models.decoder import HybridLM

Row = dict[str, Any]


def measure(
    target: HybridLM,
    draft: HybridLM,
    prompts: Sequence[np.ndarray],
    k: int,
    temperature: float,
    max_new_tokens: int,
    plain: Sequence[np.ndarray],
) -> Row:
    """Returns what speculation gained, and how greedy answers differ from `plain`'s.

    In bfloat16 rounding decides near-ties: `largest_gap` says how near.
    """
    answers, stats = speculative.generate(
        target,
        draft,
        prompts,
        k=k,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature),
    )
    shares = stats.accepted_at / max(stats.num_steps, 1)
    row = {
        "tokens_per_step": round(stats.tokens_per_step, 4),
        "accepted_at": [round(float(share), 4) for share in shares],
        "steps": stats.num_steps,
        "prompts": len(prompts),
        "new_tokens": int(answers.lengths.sum()),
        "distinct_4grams": distinct_ngrams(answers.rows(), 4),
        "draft_params_m": millions(draft),
    }
    if temperature == 0:
        gaps = divergences(target, prompts, plain, answers.rows())
        row["equal_to_plain"] = len(prompts) - len(gaps)
        row["largest_gap"] = round(max(gaps, default=0.0), 4)
    return row


def divergences(
    model: HybridLM,
    prompts: Sequence[np.ndarray],
    plain: Sequence[np.ndarray],
    others: Sequence[np.ndarray],
) -> list[float]:
    """Returns, for each answer that differs, by how much `model` prefers the plain one.

    That is the difference of the logits of the first two tokens that differ.
    """
    width = max(map(len, prompts)) + max(map(len, [*plain, *others]))
    tokens = np.zeros((len(prompts), -(-width // 64) * 64), np.int32)
    at, pair = np.zeros((len(prompts),), np.int32), []
    differs = []
    for i, (prompt, a, b) in enumerate(zip(prompts, plain, others, strict=True)):
        row = np.concatenate([prompt, a])
        tokens[i, : row.size] = row
        size = min(len(a), len(b))
        found = np.flatnonzero(a[:size] != b[:size])
        differs.append(found.size > 0)
        first = int(found[0]) if found.size else 0
        at[i] = len(prompt) + first - 1
        pair.append((a[first], b[first]))
    gaps = np.asarray(_gaps(model, tokens, at, np.array(pair, np.int32)))
    return [float(gap) for gap in gaps[np.array(differs)]]


@jax.jit
def _gaps(
    model: HybridLM,
    tokens: Int[Array, "B L"],
    at: Int[Array, "B"],
    pair: Int[Array, "B 2"],
) -> Float[Array, "B"]:
    hidden = model.hidden(tokens)
    last = jnp.take_along_axis(hidden, at[:, None, None], axis=1)
    logits = jnp.take_along_axis(model.logits(last)[:, 0], pair, axis=1)
    return logits[:, 0] - logits[:, 1]


def distinct_ngrams(rows: Iterable[np.ndarray], n: int) -> float:
    """Returns the share of different n-grams in a row, mean over rows; 1 never repeats."""
    shares = []
    for row in rows:
        grams = [tuple(row[i : i + n].tolist()) for i in range(len(row) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return round(float(np.mean(shares)), 4) if shares else 1.0


def millions(model: HybridLM) -> float:
    """Returns the number of parameters in millions."""
    blueprint = decoder.Blueprint.create(model.config, model.compute)
    count = sum(math.prod(leaf.shape) for leaf in blueprint.abstract().values())
    return round(count / 1e6, 2)


def acceptance_table(rows: Sequence[Row]) -> str:
    """Returns tokens per step in Markdown, by target, draft, temperature and K."""
    rows = [row for row in rows if row["measure"] == "acceptance"]
    ks = sorted({row["k"] for row in rows})
    lines = ["Tokens per step, measured with the small models:", ""]
    lines += _header(["world", "target", "draft", "T"], [f"K={k}" for k in ks])
    for key, found in _groups(rows).items():
        cells = [f"{found[k]['tokens_per_step']:.2f}" if k in found else "" for k in ks]
        depth = f"{key[2]} layer{'s' * (key[2] > 1)}"
        lines.append(_line(*key[:2], depth, key[3], *cells))
    return "\n".join(lines) + "\n"


def speedup_table(rows: Sequence[Row], step_times: Sequence[Row]) -> str:
    """Returns in Markdown what the measured acceptance is worth at measured step times.

    The times are those of a large model with random weights; the same kind of target, depth
    of the draft and K go together. Speed-up: tokens per step * plain step / whole step.
    """
    lines = [
        "Speed-up over plain decoding, batch 1. Measured at different sizes: tokens per "
        "step with the small trained models and all tokens in the draft's head, times with "
        "the large shape and random weights.",
        "",
    ]
    lines += _header(
        ["world", "target", "large shape", "draft", "T", "K"],
        ["tokens per step (small)", "step ms (large)", "plain ms (large)", "speed-up"],
    )
    known = len(lines)
    for (world, target, depth, temperature), found in _groups(rows).items():
        for (model, draft, k), at in _timed(step_times, target, depth).items():
            if k not in found:
                continue
            gain = found[k]["tokens_per_step"]
            # Times hardly depend on how many drafts are accepted; the nearest is taken.
            near = min(at, key=lambda row: abs(row["tokens_per_step"] - gain))
            step, plain = near["step_ms"], near["plain_ms"]
            numbers = [f"{n:.2f}" for n in (gain, step, plain, gain * plain / step)]
            lines.append(_line(world, target, model, draft, temperature, k, *numbers))
    return "\n".join(lines) + "\n" if len(lines) > known else ""


def _timed(
    step_times: Sequence[Row], target: str, depth: int
) -> dict[tuple[str, str, int], list[Row]]:
    """Returns the speculative rows of such targets and drafts by model, draft and K."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in step_times:
        if row["mode"] != "speculative" or row["batch"] != 1:
            continue
        hybrid = re.search(r"_(mamba2?_\d+)$", row["model"])
        kind = hybrid[1] if hybrid else "teacher"
        is_same = kind == target and (hybrid or "mamba" not in row["model"])
        if is_same and row["draft"].startswith(f"{depth} layers"):
            found.setdefault((row["model"], row["draft"], row["k"]), []).append(row)
    return found


def _groups(rows: Sequence[Row]) -> dict[tuple, dict[int, Row]]:
    """Returns rows by world, target, draft and temperature, then by K."""
    groups: dict[tuple, dict[int, Row]] = {}
    names = ("world", "target", "draft_layers", "temperature")
    found = [row for row in rows if row["measure"] == "acceptance"]
    for row in sorted(found, key=lambda row: [row[n] for n in names]):
        groups.setdefault(tuple(row[n] for n in names), {})[row["k"]] = row
    return groups


def _header(words: Sequence[str], numbers: Sequence[str]) -> list[str]:
    rule = ["---"] * len(words) + ["---:"] * len(numbers)
    return [_line(*words, *numbers), _line(*rule)]


def _line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
