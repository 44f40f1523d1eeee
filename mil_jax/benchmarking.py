"""Where figures come from: the device, the versions and the commit beside every number."""

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax


def describe_run() -> dict[str, Any]:
    """Returns device, versions, commit and date of this run."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "device": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def record(path: Path, row: Mapping[str, Any], key: tuple[str, ...]) -> None:
    """Adds `row` to the file's rows, in place of one with equal values at `key`.

    The header tells of the newest run; each row names its own commit.
    """
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    header = describe_run()
    row = {**row, "commit": header["commit"], "date": header["date"]}
    rows = [r for r in found["rows"] if any(r.get(k) != row[k] for k in key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, so that a kill never costs the rows of earlier runs.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**header, "rows": [*rows, row]}, indent=2) + "\n")
    partial.replace(path)


def _commit() -> str:
    """Returns the commit of the code, "+" behind it if files differ from it.

    Where the code runs from a copy without its history, MIL_JAX_COMMIT names it.
    """
    if known := os.environ.get("MIL_JAX_COMMIT"):
        return known
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
