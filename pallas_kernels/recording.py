"""Benchmark results as a JSON file: rows, and above them where the figures come from."""

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


def describe_run(packages: Sequence[str] = ("jax", "jaxlib")) -> dict[str, Any]:
    """Returns device, versions of `packages`, commit and date of this run."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """Returns the commit of the code, "+" behind it if files differ from it.

    Where the code runs from a copy without its history, MIL_JAX_COMMIT names it.
    """
    if known := os.environ.get("MIL_JAX_COMMIT"):
        return known
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def record(
    path: Path,
    header: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    key: Sequence[str],
) -> None:
    """Merges rows into a file, in place of its rows with the same values at `key`.

    Args:
      path: The file; its folder is made.
      header: From `describe_run`; tells of the newest run. Its commit and date are added
        to the new rows, so that a later run's header does not speak for them.
      rows: What is measured, each with all of `key`.
      key: Fields that name a row.
    """
    run = {"commit": header["commit"], "date": header["date"]}
    new = [{**row, **run} for row in rows]
    named = {tuple(row[k] for k in key) for row in new}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if tuple(row.get(k) for k in key) not in named]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, so that a kill never costs the rows of earlier runs.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**header, "rows": [*kept, *new]}, indent=2) + "\n")
    partial.replace(path)
