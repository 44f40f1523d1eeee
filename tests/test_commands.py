"""What every command's module keeps to."""

import importlib
from pathlib import Path

import pytest
from absl import flags
from checks import commands

ROOT = Path(__file__).parents[1]
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "mil_jax").rglob("*.py"))
    if "\n    define_flags(flags.FLAGS)\n" in path.read_text()
]


def test_all_are_found():
    users = [p for p in (ROOT / "mil_jax").rglob("*.py") if "DEFINE_" in p.read_text()]
    assert len(users) == len(COMMANDS) >= 7


@pytest.mark.parametrize("name", COMMANDS)
def test_importing_declares_no_flag(name):
    """So that one process can import several commands, whose flags share names."""
    values = commands.parse(importlib.import_module(name))
    assert len(values) >= 3
    assert not set(values) & set(flags.FLAGS)
