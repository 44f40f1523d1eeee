"""The main job end to end on a CPU: convert, distil, export, answer (`make demo`).

python -m mil_jax.demo --config=configs/demo.py --workdir=build/demo

Runs every stage of the config, then compares student and teacher on held-out tasks and plain
with speculative decoding. Leaves report.json and losses.png in the workdir; a second start
goes on where the first one stopped. With --out the report is also recorded beside the
versions and the machine that gave it.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from mil_jax import benchmarking
from mil_jax import evaluate as evaluation
from mil_jax.checkpoint import models
from mil_jax.checkpoint.hf_import import Checkpoint
from mil_jax.cli import load_config_module, run_app
from mil_jax.config import ComputeConfig, RunConfig, from_config_dict
from mil_jax.data import sources
from mil_jax.data.chat import Tokenizer, encode_prompt, load_tokenizer
from mil_jax.generate import decode, speculative
from mil_jax.models import decoder
from mil_jax.models.decoder import HybridLM
from mil_jax.train.loop import METRICS_FILE, read_metrics
from mil_jax.train.stages import run_stage
from mil_jax.train.workdir import Workdir

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# By its name in the package also where it is run as a program.
logger = logging.getLogger("mil_jax.demo")

STAGES = ("pseudo_labels", "distill", "sft", "dpo", "draft", "export")
DRAFT_TOKENS = 4
SHOWN = 6


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    define = functools.partial(flags.DEFINE_string, flag_values=values)
    define("config", "configs/demo.py", "File with all stages.")
    define("workdir", "build/demo", "Folder of the run.")
    define("out", None, "JSON file that records the report as a row.")


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Runs the stages and the comparison."""
    del argv
    configs = load_config_module(Path(given.config))
    workdir = Workdir(Path(given.workdir))
    clock = _Clock(workdir.path / "seconds.json")

    def config_of(stage: str) -> RunConfig:
        return from_config_dict(
            RunConfig, configs.get_config(f"stage={stage}").to_dict()
        )

    for i, stage in enumerate(STAGES):
        logger.info("stage %d of %d: %s", i + 1, len(STAGES), stage)
        clock.time(stage, lambda stage=stage: run_stage(config_of(stage), workdir.path))
    report = clock.time(
        "evaluate", lambda: _compare(config_of("evaluate"), workdir, Console())
    )
    report["seconds_by_stage"] = clock.seconds
    path = workdir.path / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    if given.out:
        row = {"config": Path(given.config).stem} | report
        benchmarking.record(Path(given.out), row, ("config",))
    plot = _plot(workdir, report)
    Console().print(_table(report))
    print(f"report {path}\nplot   {plot}\nmodel  {workdir.stage('export')}")


class _Clock:
    """Seconds per stage, over all starts of one workdir."""

    def __init__(self, path: Path):
        self._path = path
        self.seconds: dict[str, float] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def time(self, stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 1)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.seconds))
            partial.replace(self._path)


def _compare(config: RunConfig, workdir: Workdir, console: Console) -> dict[str, Any]:
    """Returns teacher against student and plain against speculative decoding."""
    teacher = models.load(config.teacher)
    # What was exported is what is measured.
    student = models.load(workdir.stage("export"))
    draft = models.load(workdir.model("draft"))
    tokenizer = load_tokenizer(student.source)
    chats = sources.conversations(config.data.evaluation)
    built = {
        name: _build(checkpoint, config.compute)
        for name, checkpoint in (
            ("teacher", teacher),
            ("student", student),
            ("draft", draft),
        )
    }
    scores = {
        name: evaluation.evaluate(
            built[name],
            tokenizer,
            chats,
            max_new_tokens=config.stage.max_new_tokens,
            batch_size=config.stage.batch_size,
            name=f"evaluate {name}",
        )
        for name in ("teacher", "student")
    }
    answers = _answer(
        built["student"],
        built["draft"],
        tokenizer,
        [chats[i][:-1] for i in range(min(config.stage.batch_size, len(chats)))],
        config.stage.max_new_tokens,
    )
    _show(console, tokenizer, chats, answers["plain"], answers["speculative"])
    return {
        "teacher_exact_match": round(scores["teacher"].exact_match, 4),
        "student_exact_match": round(scores["student"].exact_match, 4),
        "teacher_ppl": round(scores["teacher"].ppl, 5),
        "student_ppl": round(scores["student"].ppl, 5),
        "ppl_ratio": round(scores["student"].ppl / scores["teacher"].ppl, 5),
        "tokens_per_step": round(answers["tokens_per_step"], 3),
        "greedy_tokens_identical": answers["identical"],
        "draft_tokens": DRAFT_TOKENS,
        "evaluated_on": config.data.evaluation,
        "attention_layers": student.config.n_layers - len(student.config.ssm_layers),
        "layers": student.config.n_layers,
    }


def _build(checkpoint: Checkpoint, compute: ComputeConfig) -> HybridLM:
    for_decoding = ComputeConfig(
        dtype=compute.dtype, param_dtype=compute.param_dtype, layout="decode"
    )
    return decoder.build(checkpoint.config, checkpoint.params, for_decoding)


def _answer(
    student: HybridLM,
    draft: HybridLM,
    tokenizer: Tokenizer,
    chats: Sequence[list],
    max_new_tokens: int,
) -> dict[str, Any]:
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    plain = decode.generate(student, prompts, max_new_tokens=max_new_tokens)
    fast, stats = speculative.generate(
        student, draft, prompts, k=DRAFT_TOKENS, max_new_tokens=max_new_tokens
    )
    identical = all(map(np.array_equal, plain.rows(), fast.rows()))
    return {
        "plain": plain.rows(),
        "speculative": fast.rows(),
        "tokens_per_step": stats.tokens_per_step,
        "identical": identical,
    }


def _show(
    console: Console,
    tokenizer: Tokenizer,
    chats: Sequence[list],
    plain: Sequence[np.ndarray],
    fast: Sequence[np.ndarray],
) -> None:
    table = Table(title="Held-out prompts, answered by the student", show_lines=True)
    for column in ("prompt", "plain", "speculative"):
        table.add_column(column, overflow="fold")
    for i in range(min(SHOWN, len(plain))):
        texts = (
            tokenizer.decode(row[i], skip_special_tokens=True) for row in (plain, fast)
        )
        asked = [m["content"] for m in chats[i] if m["role"] == "user"]
        table.add_row("\n".join(asked), *texts)
    console.print(table)


def _table(report: dict[str, Any]) -> Table:
    kept = f"{report['attention_layers']} of {report['layers']}"
    table = Table(title=f"Student keeps {kept} attention layers")
    table.add_column("on held-out tasks")
    for column in ("teacher", "student"):
        table.add_column(column, justify="right")
    table.add_row(
        "exact match",
        f"{report['teacher_exact_match']:.1%}",
        f"{report['student_exact_match']:.1%}",
    )
    table.add_row(
        "perplexity", f"{report['teacher_ppl']:.4f}", f"{report['student_ppl']:.4f}"
    )
    table.add_row("perplexity ratio", "1", f"{report['ppl_ratio']:.4f}")
    table.add_section()
    same = "yes" if report["greedy_tokens_identical"] else "NO"
    k = report["draft_tokens"]
    table.add_row(
        f"tokens per step, {k} drafted", "", f"{report['tokens_per_step']:.2f}"
    )
    table.add_row("speculative = plain, token by token", "", same)
    table.add_section()
    for stage, seconds in report["seconds_by_stage"].items():
        table.add_row(f"{stage}, seconds", "", f"{seconds:.0f}")
    return table


def _plot(workdir: Workdir, report: dict[str, Any]) -> Path:
    """Draws the losses of the three stages, and student against teacher."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    runs = {
        "stage 1: distill": workdir.conversion_steps() + [workdir.stage("distill")],
        "stage 2: SFT": [workdir.stage("sft")],
        "stage 3: DPO": [workdir.stage("dpo")],
    }
    for axis, (title, folders) in zip(axes, runs.items(), strict=False):
        start = 0
        for folder in folders:
            rows = read_metrics(folder / METRICS_FILE)
            axis.plot(
                [start + row["step"] for row in rows], [row["loss"] for row in rows]
            )
            start += len(rows)
            if folder is not folders[-1]:
                axis.axvline(start, color="grey", linestyle=":")
        axis.set(title=title, xlabel="step", ylabel="loss (nats)", yscale="log")
    names = ["exact match", "1 / perplexity"]
    for offset, who in ((-0.2, "teacher"), (0.2, "student")):
        values = [report[f"{who}_exact_match"], 1 / report[f"{who}_ppl"]]
        bars = axes[3].bar(np.arange(2) + offset, values, 0.4, label=who)
        axes[3].bar_label(bars, fmt="%.3f")
    axes[3].set(title="held-out tasks", ylim=(0, 1.3))
    axes[3].set_xticks(range(2), names)
    axes[3].legend(loc="upper center", ncols=2)
    path = workdir.path / "losses.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_app(
        functools.partial(main, flags.FLAGS),
        after_stop="the same command goes on from the last checkpoint",
    )
