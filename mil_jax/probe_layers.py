r"""Which attention layers a teacher can spare: its loss with each one silent.

python -m mil_jax.probe_layers --config=configs/demo.py \
    --out=benchmarks/results/layers_demo.json

For every layer the attention's output is set to zero and the perplexity of the held-out
answers is measured. Layers that cost little are the ones to convert first
(`conversion.steps`).
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from mil_jax import benchmarking
from mil_jax.checkpoint import models
from mil_jax.checkpoint.hf_import import Checkpoint
from mil_jax.cli import read_config, run_app
from mil_jax.config import ComputeConfig
from mil_jax.data import sources
from mil_jax.data.chat import Tokenizer, load_tokenizer
from mil_jax.data.types import Conversation
from mil_jax.evaluate import answer_nll
from mil_jax.models import decoder
from mil_jax.progress import progress

BATCH = 64


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    flags.DEFINE_integer(
        "count", 256, "Held-out conversations.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "JSON file that gets the rows.", flag_values=values
    )


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Prints the layers, the dispensable first."""
    del argv
    config = read_config(given["config"])
    teacher = models.load(config.teacher)
    tokenizer = load_tokenizer(models.resolve(config.tokenizer or teacher.source))
    held_out = sources.conversations(config.data.evaluation)
    chats = [held_out[i] for i in range(min(given.count, len(held_out)))]
    rows = []
    kinds = teacher.config.layer_types
    layers = [None, *(i for i, kind in enumerate(kinds) if kind == "attention")]
    for layer in progress(layers, desc="probe layers", unit="layer"):
        row = {"teacher": config.teacher, "silent_layer": layer}
        row |= silence(teacher, layer, config.compute, tokenizer, chats)
        row |= {"evaluated_on": config.data.evaluation, "conversations": len(chats)}
        rows.append(row)
        if given.out:
            benchmarking.record(Path(given.out), row, ("teacher", "silent_layer"))
    Console().print(_table(rows))


def silence(
    teacher: Checkpoint,
    layer: int | None,
    compute: ComputeConfig,
    tokenizer: Tokenizer,
    chats: Sequence[Conversation],
) -> dict[str, Any]:
    """Returns loss (nats per answer token) and perplexity without a layer's attention."""
    params = dict(teacher.params)
    if layer is not None:
        name = f"layers.{layer}.attn.o_proj.kernel"
        params[name] = np.zeros_like(params[name])
    model = decoder.build(teacher.config, params, compute)
    nll = tokens = 0.0
    for start in range(0, len(chats), BATCH):
        part = list(chats[start : start + BATCH])
        filled = part + [chats[0]] * (BATCH - len(part))
        batch_nll, batch_tokens = answer_nll(model, tokenizer, filled, len(part))
        nll, tokens = nll + batch_nll, tokens + batch_tokens
    loss = nll / max(tokens, 1.0)
    return {"loss": round(loss, 5), "ppl": round(math.exp(loss), 5)}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Held-out answers with one layer's attention silent")
    table.add_column("layer")
    for column in ("loss (nats)", "perplexity"):
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: row["loss"]):
        layer = row["silent_layer"]
        name = "none silent" if layer is None else str(layer)
        table.add_row(name, f"{row['loss']:.4f}", f"{row['ppl']:.4f}")
    return table


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_app(functools.partial(main, flags.FLAGS))
