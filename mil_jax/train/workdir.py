"""A run's folder: which config it belongs to, and where stages find each other's models."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from mil_jax import disk
from mil_jax.checkpoint import orbax_io
from mil_jax.config import RunConfig
from mil_jax.data.records import holds_records
from mil_jax.errors import UserError

CONFIG_FILE = "config.json"
# Records of a stage, in its folder.
DATA = "data"
_LOCK = ".lock"

# May differ between a run and its continuation: none changes what is computed.
_FREE = {
    ("mesh",),
    ("compute", "implementation"),
    ("compute", "attention"),
    ("compute", "remat"),
    ("compute", "remat_keeps"),
    ("compute", "scan_checkpoint_every"),
    ("compute", "scan_layers"),
    ("compute", "layout"),
    ("stage", "checkpoint_every"),
    ("stage", "loss_chunk"),
}

_TRAINING = ("pretrain", "distill", "sft", "dpo", "draft")
# Stages that read a key; one that is not here is read by all.
_READ_BY = {
    ("architecture",): ("pretrain",),
    ("conversion",): ("distill",),
    ("teacher",): ("pseudo_labels", "distill", "sft", "dpo", "draft"),
    ("data", "prompts"): ("pseudo_labels",),
    ("data", "conversations"): ("pretrain", "sft", "draft"),
    ("data", "preferences"): ("dpo",),
    ("data", "evaluation"): (),
    ("data", "labels"): ("distill", "draft"),
    ("stage", "start_from"): ("distill", "sft", "dpo", "draft"),
    **{
        ("stage", key): stages
        for keys, stages in {
            "temperature top_k top_p max_new_tokens": ("pseudo_labels",),
            "optimizer accumulate epochs max_steps trainable loss_on": _TRAINING,
            "packed ce_weight kl_weight kl_reduction": tuple(
                name for name in _TRAINING if name != "dpo"
            ),
            "max_prompt_length dpo_beta reference": ("dpo",),
            "draft_layers draft_depth draft_vocab_size target records": ("draft",),
        }.items()
        for key in keys.split()
    },
}

# What a stage continues by default.
PREVIOUS = {"sft": "distill", "dpo": "sft"}
# The order in which export and evaluate look for the newest model.
NEWEST_FIRST = ("dpo", "sft", "distill", "pretrain")


class Workdir:
    """Folders of one workdir: `<stage>/`, and in it `model/` once the stage is done."""

    def __init__(self, path: Path):
        self.path = path.expanduser()
        self._claims = contextlib.ExitStack()

    def __enter__(self) -> "Workdir":
        """Returns the workdir."""
        return self

    def __exit__(self, *_: object) -> None:
        """Lets other processes have what was claimed."""
        self._claims.close()

    def stage(self, name: str) -> Path:
        """Returns the folder of a stage."""
        return self.path / name

    def conversion_steps(self) -> list[Path]:
        """Returns the folders of distill's steps before the last, in order."""
        folders = self.stage("distill").glob("step_*")
        return sorted(folders, key=lambda folder: int(folder.name.split("_")[1]))

    def model(self, name: str) -> Path:
        """Returns the folder of a stage's finished model."""
        return self.stage(name) / "model"

    def claim(self, name: str, config: RunConfig) -> Path:
        """Returns the stage's folder after checking that it belongs to `config`.

        A folder that holds no work yet may be claimed by any config. Until this object is
        closed, no other process gets it.

        Raises:
            UserError: The folder holds work of another config, cannot be made, or another
                process works in it.
        """
        folder = self.stage(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"folder {folder} cannot be made ({error.strerror}); choose another "
                "--workdir"
            ) from None
        if jax.process_index() != 0:  # One process checks and writes for all.
            return folder
        self._lock(folder)
        file = folder / CONFIG_FILE
        wanted = json.loads(json.dumps(dataclasses.asdict(config)))
        has_work = any(map(_is_work, folder.iterdir()))
        if not (has_work and file.exists()):
            partial = file.with_suffix(".partial")
            with disk.writing(file):
                partial.write_text(json.dumps(wanted, indent=2) + "\n")
                partial.replace(file)
            return folder
        try:
            found = json.loads(file.read_text())
        except json.JSONDecodeError:
            raise UserError(
                f"{file} is damaged; delete the folder {folder} to start the stage again"
            ) from None
        difference = _first_difference(_binding(found, name), _binding(wanted, name))
        if difference:
            key, old, new = difference
            raise UserError(
                f"{folder} holds work of another config: {key} was {old!r}, now {new!r}; "
                "choose another --workdir, or delete that folder to start over"
            )
        return folder

    def _lock(self, folder: Path) -> None:
        """Keeps other processes out of a stage's folder."""
        with disk.writing(folder):
            file = self._claims.enter_context((folder / _LOCK).open("a"))
        if not disk.try_lock(file.fileno()):
            raise UserError(
                f"another process works in {folder}; wait for it, or choose another "
                "--workdir"
            )

    def labels(self, config: RunConfig) -> Path:
        """Returns the folder of the pseudo-labels that a stage trains on.

        Raises:
            UserError: It is not there, or holds labels of another model, tokenizer or
                prompts: training on them would fit another model's answers.
        """
        stage = config.stage
        folder = Path(config.data.labels or self.stage("pseudo_labels") / DATA)
        folder = folder.expanduser()
        if not folder.is_dir():
            raise UserError(
                f"stage {stage.name} trains on {folder}, which is not there: run "
                "stage=pseudo_labels first"
            )
        file = folder.parent / CONFIG_FILE
        if not file.exists():
            return folder  # Labels that were not made here.
        found = _label_keys(json.loads(file.read_text()))
        wanted = _label_keys(json.loads(json.dumps(dataclasses.asdict(config))))
        # A draft may learn from the model it is cut from or from its target.
        if stage.name == "draft" and found["teacher"] in (
            stage.start_from,
            stage.target,
        ):
            wanted["teacher"] = found["teacher"]
        if difference := _first_difference(found, wanted):
            key, old, new = difference
            raise UserError(
                f"{file.parent} holds labels of another config: {key} was {old!r}, now "
                f"{new!r}; give stage {stage.name} the same, or choose another --workdir"
            )
        return folder

    def start_of(self, name: str, override: str) -> str:
        """Returns the folder or id of the model that a stage starts from.

        Raises:
            UserError: The stage before has not finished.
        """
        if override:
            return override
        before = PREVIOUS[name]
        found = self.newest_step(before)
        if found is None:
            raise UserError(
                f"stage {name} continues stage {before}, which has not finished in "
                f"{self.path}: run stage={before} first, or set stage.start_from"
            )
        return str(found)

    def newest_step(self, name: str) -> Path | None:
        """Returns a stage's finished model; of distill, that of its last step."""
        path = self.model(name)
        return path if orbax_io.is_model_dir(path) else None

    def newest(self) -> Path:
        """Returns the model of the latest finished stage.

        Raises:
            UserError: No stage has finished.
        """
        for name in NEWEST_FIRST:
            if found := self.newest_step(name):
                return found
        raise UserError(
            f"{self.path} holds no finished model; run a stage first or set "
            "stage.start_from"
        )


def _is_work(entry: Path) -> bool:
    """Returns whether something in a stage's folder would be lost or mixed up."""
    if entry.name == DATA and entry.is_dir():
        return holds_records(entry)
    return entry.name not in (CONFIG_FILE, _LOCK)


def _label_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "teacher": config["teacher"],
        "tokenizer": config["tokenizer"],
        "data": {"prompts": config["data"]["prompts"]},
    }


def _binding(values: Any, stage: str, path: tuple[str, ...] = ()) -> Any:
    """Returns the config without the keys that may change between runs of a stage."""
    if not isinstance(values, dict):
        return values
    return {
        key: _binding(value, stage, (*path, key))
        for key, value in values.items()
        if (*path, key) not in _FREE and stage in _READ_BY.get((*path, key), (stage,))
    }


def _first_difference(
    old: Any, new: Any, path: str = ""
) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            dotted = f"{path}.{key}" if path else key
            found = _first_difference(old.get(key), new.get(key), dotted)
            if found:
                return found
        return None
    return None if old == new else (path, old, new)
