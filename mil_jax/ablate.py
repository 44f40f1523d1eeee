r"""How a choice at conversion shows in the loss: at step 0, after stage 1, held out.

python -m mil_jax.ablate --config=configs/demo.py --workdir=build/ablation \
    --vary=channel_order=aligned,original --vary=dt_init=mamba,original \
    --vary=init_from=attention,random --out=benchmarks/results/ablation_demo.json

The first value of every key is the base; each other value changes that key alone.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mil_jax import benchmarking
from mil_jax.cli import load_config_module, run_app
from mil_jax.config import ConversionConfig, RunConfig, from_config_dict
from mil_jax.errors import UserError
from mil_jax.train.loop import METRICS_FILE, read_metrics
from mil_jax.train.stages import run_stage
from mil_jax.train.workdir import Workdir

LAST_STEPS = 20


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    define = functools.partial(flags.DEFINE_string, flag_values=values)
    define("config", "configs/demo.py", "File with all stages.")
    define("workdir", "build/ablation", "One folder per variant.")
    define("out", None, "JSON file that gets the rows.")
    flags.DEFINE_multi_string(
        "vary", [], "conversion key=base,other,...", flag_values=values
    )


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Distils every variant and prints its row."""
    del argv
    configs = load_config_module(Path(given.config))
    root = Path(given.workdir)

    def config_of(stage: str) -> RunConfig:
        return from_config_dict(
            RunConfig, configs.get_config(f"stage={stage}").to_dict()
        )

    labels = run_stage(config_of("pseudo_labels"), root / "labels").parent
    for name, changes in variants(given.vary).items():
        row = {"variant": name} | run_variant(
            config_of("distill"), config_of("evaluate"), changes, root / name, labels
        )
        print(row)
        if given.out:
            benchmarking.record(Path(given.out), row, ("variant",))


def variants(specs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns the changes of each variant by its name.

    Raises:
        UserError: A spec is not `key=base,other,...` of `ConversionConfig`.
    """
    known = {field.name for field in dataclasses.fields(ConversionConfig)}
    parsed: dict[str, list[str]] = {}
    for spec in specs:
        key, _, values = spec.partition("=")
        if key not in known or len(values.split(",")) < 2:
            raise UserError(
                f"--vary={spec} is not understood; write key=base,other with a key of "
                f"conversion: {', '.join(sorted(known))}"
            )
        parsed[key] = values.split(",")
    base = {key: values[0] for key, values in parsed.items()}
    found = {"base": base}
    for key, values in parsed.items():
        for value in values[1:]:
            found[f"{key}={value}"] = base | {key: value}
    return found


def run_variant(
    distill: RunConfig,
    evaluate: RunConfig,
    changes: dict[str, str],
    folder: Path,
    labels: Path,
) -> dict[str, Any]:
    """Returns losses of stage 1 by conversion step, and scores on held-out data."""
    values = dataclasses.asdict(distill.conversion) | changes
    conversion = from_config_dict(ConversionConfig, values, "conversion")
    workdir = Workdir(folder)
    if not workdir.stage("pseudo_labels").exists():
        shutil.copytree(labels, workdir.stage("pseudo_labels"))
    run_stage(dataclasses.replace(distill, conversion=conversion), folder)
    run_stage(evaluate, folder)
    folders = workdir.conversion_steps()
    losses = {}
    for i, step in enumerate([*folders, workdir.stage("distill")]):
        rows = read_metrics(step / METRICS_FILE)
        last = rows[-LAST_STEPS:]
        losses[f"ce_first_{i}"] = round(rows[0]["ce"], 4)
        losses[f"ce_last_{i}"] = round(sum(r["ce"] for r in last) / len(last), 4)
    scores = json.loads((workdir.stage("evaluate") / "scores.json").read_text())
    return losses | {
        "exact_match": round(scores["exact_match"], 4),
        "ppl": round(scores["ppl"], 4),
        "evaluated_on": scores["data"],
    }


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_app(functools.partial(main, flags.FLAGS))
