"""Folders that get their name only once they are complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mil_jax import disk
from mil_jax.errors import UserError


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden sibling of `path` that takes its name if the body succeeds.

    Nothing is left of a body that fails, and what a killed process left is removed first.
    Of several processes all may write; the first one makes, names and removes the folder,
    and none goes on before it has its name.

    Raises:
        UserError: The disk is full or cannot be written to, or another process is
            writing the same folder.
    """
    partial = path.parent / f".{path.name}.partial"
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk.writing(path))
        if jax.process_index() == 0:
            stack.callback(os.close, _claim_empty(partial, path))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
        multihost_utils.sync_global_devices(f"{path} is begun")
        yield partial
        if jax.process_index() == 0:
            # A name must not outrun what it stands for.
            for part in [*partial.rglob("*"), partial]:
                disk.sync(part)
            os.replace(partial, path)
            disk.sync(path.parent)
        multihost_utils.sync_global_devices(f"{path} is complete")


def _claim_empty(partial: Path, path: Path) -> int:
    """Makes the folder anew; returns its descriptor, which keeps others away."""
    descriptors = []
    try:
        for is_new in (False, True):
            if is_new:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            if partial.is_dir():
                descriptors.append(os.open(partial, os.O_RDONLY))
                if not disk.try_lock(descriptors[-1]):
                    raise UserError(f"another process is writing {path}; wait for it")
        return descriptors.pop()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
