"""Orbax: the finished model of a stage, and the state of a run. One per-layer layout.

A finished model is a folder:

    weights/            Orbax; one array per tensor and layer, named as in `Params`
    model_config.json   `ModelConfig`
    tokenizer files     as in a Hugging Face folder, where known
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mil_jax import disk
from mil_jax.array_types import Params
from mil_jax.checkpoint.folders import new_folder
from mil_jax.checkpoint.hf_export import ASSETS, GENERATION_CONFIG
from mil_jax.config import ModelConfig, model_config_from_dict, model_config_to_dict
from mil_jax.errors import UserError

CONFIG_FILE = "model_config.json"
WEIGHTS = "weights"

# Seconds that a save which failed has to end before what it wrote is in the way.
_PATIENCE = 60.0

# What a model needs besides its weights to be used and exported.
TOKENIZER_FILES = (*ASSETS, GENERATION_CONFIG)


def is_model_dir(path: Path) -> bool:
    """Returns whether `path` is a folder written by `save_model`."""
    return (path / CONFIG_FILE).is_file()


def save_model(
    path: Path,
    config: ModelConfig,
    params: Params,
    *,
    assets_from: Path | None = None,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Writes a finished model; the folder appears only when it is complete.

    Every process of a job calls it, and finds the folder there when it returns.

    Args:
        path: New folder.
        config: The architecture.
        params: Per-layer weights, on host or devices.
        assets_from: Folder whose tokenizer files are copied.
        add: Called by one process with the folder under its first name, to write what
            else belongs to the model.

    Raises:
        UserError: `path` exists already, or cannot be written; nothing is left there.
    """
    if path.exists():
        raise UserError(
            f"{path} exists; nothing is overwritten: move it or name another"
        )
    with new_folder(path) as partial:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / WEIGHTS).absolute(), dict(params))
        if jax.process_index() == 0:
            copy_tokenizer(assets_from, partial)
            text = json.dumps(model_config_to_dict(config), indent=2)
            (partial / CONFIG_FILE).write_text(text + "\n")
            if add is not None:
                add(partial)


def load_model(path: Path) -> tuple[ModelConfig, Params]:
    """Reads a finished model into host memory.

    Raises:
        UserError: The folder is not a complete model.
    """
    config = read_config(path)
    with ocp.StandardCheckpointer() as checkpointer:
        remedy = f"copy it again, or delete {path} and run its stage again"
        with _readable(path / WEIGHTS, remedy):
            metadata = checkpointer.metadata((path / WEIGHTS).absolute())
            tree = getattr(metadata, "item_metadata", metadata)
            if tree is None:
                raise FileNotFoundError("what it holds is not said")
            abstract = {
                name: np.empty((0,), leaf.dtype).dtype for name, leaf in tree.items()
            }
            shapes = {name: leaf.shape for name, leaf in tree.items()}
            host = jax.sharding.SingleDeviceSharding(
                jax.local_devices(backend="cpu")[0]
            )
            target = {
                name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=host)
                for name, dtype in abstract.items()
            }
            params = checkpointer.restore((path / WEIGHTS).absolute(), target)
    return config, {name: np.asarray(value) for name, value in params.items()}


def copy_tokenizer(source: Path | None, target: Path) -> None:
    """Copies tokenizer files that exist in `source`."""
    for name in TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class RunCheckpoints:
    """Checkpoints of one training run: state and position, the newest two kept.

    An old one is deleted only once its successor is complete, so the disk needs room for
    three. Each holds 12 bytes per trained weight (the weight and Adam's two moments, in
    float32), and while one is written every host keeps a copy of its share of them: 96 GB
    in all for 8 billion weights, whatever the number of devices.
    """

    def __init__(self, directory: Path):
        """Opens the folder; what a killed process left half-written is removed.

        Raises:
            UserError: The folder cannot be made.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._directory = directory
        with self._writing():
            if jax.process_index() == 0:
                _remove_unfinished(directory)
            multihost_utils.sync_global_devices(f"{directory} is clean")
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Returns the newest complete checkpoint's step; half-written ones are ignored."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Writes `state` (arrays) and `position` (JSON) in the background.

        Raises:
            UserError: The checkpoint before could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave(dict(position)),
        )
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def check_for_errors(self) -> None:
        """Tells of a checkpoint that could not be written; waits for none.

        Raises:
            UserError: The newest one has failed.
        """
        # The manager's own check mostly comes after its thread, which has the error then.
        # Coming first it takes the error away, and the thread deletes an old checkpoint
        # as if this one were complete.
        if not self._manager.is_saving_in_progress():
            with self._writing():
                self._manager.wait_until_finished()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Returns what `save` wrote, with the shardings of `abstract_state`.

        Raises:
            UserError: The checkpoint is damaged.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state),
            position=ocp.args.JsonRestore(),
        )
        remedy = "delete it to go on from the one before"
        with _readable(self._directory / str(step), remedy):
            restored = self._manager.restore(step, args=items)
        return restored.state, restored.position

    def close(self) -> None:
        """Waits for writes in the background.

        Raises:
            UserError: A checkpoint could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            # Orbax counts the failed one too: what is there is what the disk holds.
            steps = ocp.utils.checkpoint_steps(self._directory)
            kept = f"after step {max(steps)}" if steps else "from the start"
            with disk.writing(self._directory, f"the same command then goes on {kept}"):
                raise


def _remove_unfinished(directory: Path) -> None:
    """Removes checkpoints that were not completed.

    Their writers may still be at it: of a failed save Orbax tells the first error while
    the other parts go on, and offers nothing to wait for.
    """
    deadline = time.monotonic() + _PATIENCE
    for path in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        while path.exists():
            try:
                shutil.rmtree(path)
            except OSError as error:
                written_to = error.errno in (errno.ENOTEMPTY, errno.ENOENT)
                if not written_to or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def read_config(path: Path) -> ModelConfig:
    """Returns the architecture of a finished model.

    Raises:
        UserError: The folder holds none, or it is damaged.
    """
    file = path / CONFIG_FILE
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} holds no {CONFIG_FILE}; it is not a model") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); save it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object; save it again")
    try:
        return model_config_from_dict(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


@contextlib.contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    """Turns Orbax's many ways of failing on damaged files into one line."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):  # A device or the host is full.
        raise
    except Exception as error:  # Orbax raises this very class for a missing chunk.
        code = disk.system_error(error)
        if code not in (None, errno.ENOENT):  # It may be whole: nothing to delete.
            raise UserError(
                f"checkpoint {path} cannot be read ({os.strerror(code)}); check the "
                "disk and your rights"
            ) from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200]
        raise UserError(
            f"checkpoint {path} cannot be read ({type(cause).__name__}: {reason}); it is "
            f"damaged or half-written: {remedy}"
        ) from error
