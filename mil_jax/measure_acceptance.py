r"""How many tokens a step speculation gains, on models trained here from nothing.

python -m mil_jax.measure_acceptance --world=demo --workdir=build/acceptance/demo \
    --out=benchmarks/results/acceptance_h200.json
python -m mil_jax.measure_acceptance --world=text --text=notes.txt --text=chats.jsonl \
    --tokenizer=FOLDER --workdir=build/acceptance/text --out=...

Runs the stages of configs/acceptance.py: a teacher, its answers, hybrids of it, and drafts
cut from it that learn from each hybrid. Then decodes held-out prompts speculatively with
every draft, K and temperature. Started again, it goes on where it stopped. Where step times
of large models are on record (--step_times), a second table combines them with the
acceptance measured here; --show prints both for rows on record.

Several processes may measure other targets or drafts in one workdir at a time, once the
teacher is there: --targets= trains it alone, --drafts= a target alone.
"""

import concurrent.futures
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import flags

from mil_jax import acceptance, benchmarking
from mil_jax import evaluate as evaluation
from mil_jax.checkpoint import models
from mil_jax.cli import load_config_module, run_app
from mil_jax.config import ComputeConfig, DataConfig, RunConfig, from_config_dict
from mil_jax.data import passages
from mil_jax.data.chat import Tokenizer, encode_prompt, load_tokenizer
from mil_jax.data.sources import conversations
from mil_jax.data.types import Conversation
from mil_jax.errors import UserError
from mil_jax.generate import decode, draft_vocab, speculative
from mil_jax.models import decoder
from mil_jax.models.decoder import HybridLM
from mil_jax.train.stages import run_stage
from mil_jax.train.workdir import DATA

MAX_PROMPT = 64  # tokens; so that all batches of prompts have one or two widths
KEY = ("world", "recipe", "measure", "target", "draft_layers", "k", "temperature")
Row = acceptance.Row


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    text, many, comma_list, number, yes_no, choice = (
        functools.partial(define, flag_values=values)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_multi_string,
            flags.DEFINE_list,
            flags.DEFINE_integer,
            flags.DEFINE_bool,
            flags.DEFINE_enum,
        )
    )
    text("config", "configs/acceptance.py", "File with all stages.")
    choice("world", "demo", ["demo", "text"], "What the models learn.")
    many("text", [], "File of --world=text: .txt, or chats.")
    text("tokenizer", None, "Folder or hub id, for text.")
    text("workdir", "build/acceptance/demo", "Folder of the run.")
    text("out", None, "JSON file that gets the rows.")
    targets = "teacher, or MIXER_SHARE of attention left."
    comma_list("targets", "mamba2_50,mamba_25", targets)
    comma_list("drafts", "1,2,4", "Layers of the drafts.")
    comma_list("ks", "2,3,4,5,6,7,8", "Tokens drafted per step.")
    comma_list("temperatures", "0,0.8", "0 is greedy.")
    number("prompts", 64, "Held-out prompts to answer.")
    many("set", [], "Change a stage: draft.kl_weight=0")
    yes_no("tiny", False, "Rehearse it on a CPU.")
    number("threads", 8, "Programs compiled at a time.")
    record = "benchmarks/results/decode_h200.json"
    text("step_times", record, "From mil_jax.bench_decode.")
    text("show", None, "Only print the tables of this JSON file.")


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Trains what is not there yet, measures, prints the tables."""
    del argv
    if given.show:
        _print_tables(_rows_of(given.show), "", given.step_times)
        return
    targets = [_parse_target(name) for name in given.targets]
    drafts, ks = _integers(given["drafts"]), _integers(given["ks"])
    if not ks or min(ks) < 1 or max(ks) > speculative.MAX_K:
        raise UserError(f"--ks has {ks}; each must be 1 to {speculative.MAX_K}")
    grid = list(itertools.product(ks, _temperatures(given.temperatures)))
    world = _prepare(given)
    teacher = _run(world.config("pretrain"), world.folder / "teacher")
    labels = _run(
        world.config("pseudo_labels", teacher=teacher), world.folder / "labels"
    )
    results = Results(world.folder / "acceptance.json", given.out)
    for name, student in targets:
        target = teacher
        if student:
            config = world.config(
                "distill", teacher=teacher, labels=labels, student=student
            )
            target = _run(config, world.folder / name)
        pairs = {
            depth: _draft(world, name, depth, teacher, labels, target)
            for depth in drafts
        }
        measure(
            world,
            name,
            target,
            pairs,
            grid,
            results,
            num_prompts=given.prompts,
            threads=given.threads,
        )
    _print_tables(results.rows(), world.recipe, given.step_times)


def _print_tables(rows: Sequence[Row], recipe: str, step_times: str) -> None:
    rows = [row for row in rows if row["recipe"] == recipe]
    timed = _rows_of(step_times) if Path(step_times).exists() else []
    print(acceptance.acceptance_table(rows))
    print(acceptance.speedup_table(rows, timed))


def _rows_of(path: str | Path) -> list[Row]:
    try:
        return json.loads(Path(path).read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no file of measurements ({error!r})") from None


def _draft(
    world: "World", name: str, depth: int, teacher: Path, labels: Path, target: Path
) -> Path:
    """Trains a draft of so many layers of the teacher to speculate for the target.

    With --set=draft.start_from=target its layers are the target's.
    """
    changes = world.changes.get("draft", {})
    parts = [f"draft_{depth}", *(f"{key}={value}" for key, value in changes.items())]
    folder = re.sub(r"[^\w.,=-]", "_", ",".join(parts))
    sources = {"draft_depth": depth, "target": str(target)}
    if changes.get("start_from") == "target":
        sources["start_from"] = str(target)
    config = world.config("draft", teacher=teacher, labels=labels, **sources)
    return _run(config, world.folder / name / folder)


def _run(config: RunConfig, folder: Path) -> Path:
    start = time.perf_counter()
    path = run_stage(config, folder)
    print(f"{path}: {time.perf_counter() - start:.1f} s", flush=True)
    return path


@dataclasses.dataclass(frozen=True)
class World:
    """What the models learn and where they are.

    Attributes:
        name: "demo" or "text".
        folder: Of everything.
        configs: The module with `get_config`.
        tokenizer: Of all models.
        tokenizer_name: Its folder or name.
        is_tiny: Whether this is a rehearsal.
        changes: From --set: by stage, dotted keys and their values.
    """

    name: str
    folder: Path
    configs: ModuleType
    tokenizer: Tokenizer
    tokenizer_name: str
    is_tiny: bool
    changes: dict[str, dict[str, Any]]

    @property
    def recipe(self) -> str:
        """Returns what differs from the config file, "" if nothing does."""
        return " ".join(
            f"{stage}.{key}={value}"
            for stage, values in self.changes.items()
            for key, value in values.items()
        )

    def file(self, part: str) -> Path:
        """Returns the chats of "train", "prompts" or "held_out"."""
        return self.folder / DATA / f"{part}.jsonl"

    def row(
        self,
        measure: str,
        target: str,
        draft_layers: int | None = None,
        k: int | None = None,
        temperature: float | None = None,
    ) -> Row:
        """Returns a row of which nothing is measured yet."""
        values = (self.name, self.recipe, measure, target, draft_layers, k, temperature)
        return dict(zip(KEY, values, strict=True))

    def _values(self, stage: str, **args: str) -> dict[str, Any]:
        """Returns what the config file says, as a dict."""
        args = {"stage": stage, "world": self.name} | args
        arg = ",".join(f"{key}={value}" for key, value in args.items())
        found = self.configs.get_config(arg + (",tiny" if self.is_tiny else ""))
        return found.to_dict()

    def demo_data(self) -> DataConfig:
        """Returns the tasks of the demo world that are used."""
        return from_config_dict(DataConfig, self._values("pretrain")["data"], "data")

    def config(
        self,
        stage: str,
        *,
        teacher: Path | str = "",
        labels: Path | str = "",
        student: dict[str, str] | None = None,
        **changes: Any,
    ) -> RunConfig:
        """Returns the config of a stage; `changes` are of the stage itself."""
        values = self._values(stage, **(student or {}))
        for dotted, value in self.changes.get(stage, {}).items():
            *path, last = dotted.split(".")
            node = values["stage"]
            for key in path:
                node = node.get(key)
                if not isinstance(node, dict):
                    raise UserError(f"--set={stage}.{dotted}: {key} has no keys")
            node[last] = value
        config = from_config_dict(RunConfig, values)
        architecture = config.architecture
        if architecture is not None:
            eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
            architecture = dataclasses.replace(
                architecture,
                vocab_size=-(-len(self.tokenizer) // 64) * 64,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_ids=(eos,),
                pad_token_id=eos if pad is None else pad,
            )
        return dataclasses.replace(
            config,
            teacher=str(teacher),
            tokenizer=self.tokenizer_name,
            architecture=architecture,
            data=DataConfig(
                prompts=str(self.file("prompts")),
                conversations=str(self.file("train")),
                evaluation=str(self.file("held_out")),
                labels=str(labels),
            ),
            stage=dataclasses.replace(config.stage, **changes),
        )


class Results:
    """Rows measured so far, in the workdir and in the file for the record."""

    def __init__(self, path: Path, out: str | None):
        self._path = path
        self._out = Path(out) if out else None

    def rows(self) -> list[Row]:
        """Returns the rows of this workdir."""
        return _rows_of(self._path) if self._path.exists() else []

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """Returns those of some rows, given by their keys, that are not measured yet."""
        found = {tuple(row[k] for k in KEY) for row in self.rows()}
        return [row for row in rows if tuple(row[k] for k in KEY) not in found]

    def add(self, row: Row) -> None:
        """Records a row; other processes may be measuring into the same files."""
        for path in filter(None, (self._path, self._out)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                benchmarking.record(path, row, KEY)


def _parse_target(name: str) -> tuple[str, dict[str, str] | None]:
    if name == "teacher":
        return name, None
    found = re.fullmatch(r"(mamba2?)_(50|25)", name)
    if not found:
        raise UserError(
            f"--targets names {name!r}; expected teacher, mamba_50, mamba_25, mamba2_50 "
            "or mamba2_25"
        )
    return name, {"mixer": found[1], "attention": found[2]}


def _integers(flag: flags.Flag) -> list[int]:
    try:
        values = [int(text) for text in flag.value]
    except ValueError:
        values = [0]
    if min(values, default=1) < 1:
        raise UserError(f"--{flag.name} is {','.join(flag.value)}; give numbers from 1")
    return values


def _changes(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        found = re.fullmatch(
            r"(pretrain|pseudo_labels|distill|draft)\.([\w.]+)=(.+)", text
        )
        if not found:
            raise UserError(f"--set={text} is not understood; write STAGE.KEY=VALUE")
        stage, key, value = found.groups()
        try:
            changes.setdefault(stage, {})[key] = json.loads(value)
        except ValueError:
            changes.setdefault(stage, {})[key] = value
    return changes


def _temperatures(texts: Sequence[str]) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = [-1.0]
    if min(values) < 0:
        raise UserError(f"--temperatures is {','.join(texts)}; give numbers from 0")
    return values


def _prepare(given: flags.FlagValues) -> World:
    """Returns the world, with its chats and its tokenizer in the workdir."""
    folder = Path(given.workdir)
    configs = load_config_module(Path(given.config))
    if given.world == "demo":
        name = models.DEMO_TEACHER
    elif not given.text or not given.tokenizer:
        raise UserError("--world=text needs --text=FILE (one or more) and --tokenizer")
    else:
        name = str(_chat_tokenizer(given.tokenizer, folder / "tokenizer"))
    world = World(
        name=given.world,
        folder=folder,
        configs=configs,
        tokenizer=load_tokenizer(models.resolve(name)),
        tokenizer_name=name,
        is_tiny=given.tiny,
        changes=_changes(given.set),
    )
    for stage in world.changes:
        world.config(stage)  # So that a wrong key is found before anything is done.
    note = folder / DATA / "texts.json"
    texts = [world.name, *given.text]
    if not note.exists():
        _write_chats(world, given.text)
        note.write_text(json.dumps(texts))
    elif json.loads(note.read_text()) != texts:
        raise UserError(f"{folder} holds work on other texts; choose another --workdir")
    return world


def _write_chats(world: World, texts: Sequence[str]) -> None:
    """Writes what the stages read: chats, prompts and held-out chats."""
    if world.name == "demo":
        data = world.demo_data()
        train, prompts, held_out = (
            list(conversations(spec))
            for spec in (data.conversations, data.prompts, data.evaluation)
        )
    else:
        train, held_out = passages.split(passages.read(texts))
        prompts = train
    passages.write(world.file("train"), train)
    for part, chats in (("prompts", prompts), ("held_out", held_out)):
        found = passages.short(chats, world.tokenizer, MAX_PROMPT)
        if not found:
            raise UserError(
                f"{len(chats)} chats for {part} have no prompt of up to {MAX_PROMPT} "
                "tokens; give more text"
            )
        passages.write(world.file(part), found)


def _chat_tokenizer(source: str, folder: Path) -> Path:
    """Writes the tokenizer with a plain chat template if it has none."""
    if not folder.exists():
        tokenizer = load_tokenizer(source, needs_chat_template=False)
        if tokenizer.eos_token is None:
            tokenizer.eos_token = "<|endoftext|>"
        if not tokenizer.chat_template:
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == "
                "'assistant' else '\n\n' }}{% endfor %}"
            )
        tokenizer.save_pretrained(folder)
    return folder


def measure(
    world: World,
    name: str,
    target_folder: Path,
    draft_folders: dict[int, Path],
    grid: Sequence[tuple[int, float]],
    results: Results,
    *,
    num_prompts: int,
    threads: int,
) -> None:
    """Measures one target with its drafts on held-out prompts.

    As many programs as `threads` are compiled at a time, because that takes longer than
    running them.
    """
    wanted = results.missing(
        world.row("acceptance", name, depth, *how)
        for depth in draft_folders
        for how in grid
    )
    quality = world.row("quality", name)
    if not wanted and not results.missing([quality]):
        return
    chats = conversations(str(world.file("held_out")))
    chats = [chats[i] for i in range(min(len(chats), max(256, num_prompts)))]
    prompts = [encode_prompt(world.tokenizer, c[:-1]) for c in chats[:num_prompts]]
    limit = world.config("evaluate").stage.max_new_tokens
    target = _build(world, target_folder)
    drafts = {depth: _build(world, path) for depth, path in draft_folders.items()}
    plain = decode.generate(target, prompts, max_new_tokens=limit).rows()

    def run(row: Row) -> Row:
        draft = drafts[row["draft_layers"]]
        return row | acceptance.measure(
            target, draft, prompts, row["k"], row["temperature"], limit, plain
        )

    if results.missing([quality]):
        row = quality | _quality(world, target, chats, plain)
        results.add(row)
        print(row, flush=True)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for done in concurrent.futures.as_completed(
            [pool.submit(run, r) for r in wanted]
        ):
            row = done.result()
            results.add(row)
            print(
                f"{name}, {row['draft_layers']}-layer draft, K={row['k']}, temperature "
                f"{row['temperature']}: {row['tokens_per_step']} tokens per step",
                flush=True,
            )


def _quality(
    world: World,
    model: HybridLM,
    chats: Sequence[Conversation],
    plain: Sequence[np.ndarray],
) -> Row:
    row = {
        "params_m": acceptance.millions(model),
        "layers": model.config.n_layers,
        "attention_layers": model.config.n_layers - len(model.config.ssm_layers),
        "vocab_size": model.config.vocab_size,
        "distinct_4grams": acceptance.distinct_ngrams(plain, 4),
        "evaluated_on": len(chats),
    }
    nll, tokens = evaluation.answer_nll(model, world.tokenizer, chats, len(chats))
    row["ppl"] = round(math.exp(nll / max(tokens, 1.0)), 4)
    if world.name == "demo":
        texts = world.tokenizer.batch_decode(plain, skip_special_tokens=True)
        right = [
            text.strip() == chat[-1]["content"].strip()
            for text, chat in zip(texts, chats, strict=False)
        ]
        row["exact_match"] = round(sum(right) / len(right), 4)
    return row


def _build(world: World, folder: Path) -> HybridLM:
    found = models.load(folder)
    compute = world.config("evaluate").compute
    unrolled = ComputeConfig(
        dtype=compute.dtype, param_dtype=compute.dtype, scan_layers=False
    )
    model = decoder.build(found.config, found.params, unrolled)
    ids = draft_vocab.load(found.source)
    return model if ids is None else model.with_vocab(ids)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    run_app(functools.partial(main, flags.FLAGS))
