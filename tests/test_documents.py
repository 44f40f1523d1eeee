"""The documents name things that exist, and the README's first example runs."""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pytest
from checks import commands

from mil_jax import acceptance
from mil_jax.config import RunConfig, from_config_dict

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "launch/README.md",
]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_configs_and_stages_exist(path):
    text = path.read_text().replace("$CONFIG", "configs/llama3_8b_mamba_50.py")
    for name, stage in re.findall(r"configs/(\w+)\.py(?::stage=(\w+))?", text):
        module = importlib.import_module(f"configs.{name}")
        values = module.get_config(f"stage={stage}" if stage else None)
        from_config_dict(RunConfig, values.to_dict())


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_config_keys_exist(path):
    config = importlib.import_module("configs.demo").get_config()
    found = re.findall(r"--config\.([a-z_.]*[a-z])", path.read_text())
    found += re.findall(
        r"`((?:conversion|stage|data|mesh|compute)\.[a-z_]+)(?:=\w+)?`",
        path.read_text(),
    )
    for key in found:
        node = config
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def flags_of(module):
    """Returns the names of a command's flags, of either parser."""
    command = importlib.import_module(module)
    if hasattr(command, "define_flags"):
        return set(commands.parse(command))
    source = Path(command.__file__).read_text()
    return set(re.findall(r'add(?:_argument)?\(\s*"--([\w-]+)"', source))


SHOWN = [
    *DOCUMENTS,
    *sorted((ROOT / "pallas_kernels").rglob("*.md")),
    *sorted((ROOT / "configs").glob("*.py")),
    *sorted((ROOT / "mil_jax").rglob("*.py")),
    ROOT / "pallas_kernels" / "bench.py",
    ROOT / "Makefile",
]


def test_commands_take_the_flags_that_are_shown():
    found = 0
    for path in SHOWN:
        text = path.read_text().replace("\\\n", " ")
        for module, rest in re.findall(
            r"-m ((?:mil_jax|pallas_kernels)[\w.]*)(.*)", text
        ):
            package = ROOT.joinpath(*module.split("."))
            module += ".__main__" if package.is_dir() else ""
            names = {name for name in re.findall(r"--([\w-]+)", rest)}
            assert names <= flags_of(module), f"{path}: {module}"
            found += len(names)
    assert found > 80


def test_speed_ups_are_those_on_record():
    def rows(name):
        path = ROOT / "benchmarks" / "results" / f"{name}_h200.json"
        return json.loads(path.read_text())["rows"]

    text = (ROOT / "benchmarks/README.md").read_text()
    lines = acceptance.speedup_table(rows("acceptance"), rows("decode")).splitlines()
    assert len(lines) == 8
    for line in lines[4:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        world, temperature, (gain, step, plain, ratio) = cells[0], cells[4], cells[6:]
        temperature = "greedy" if temperature == "0.0" else temperature
        row = f"| {world}, {temperature} | {gain} | {step} ms | {plain} ms | {ratio}x |"
        assert row in text


def test_first_example_prints_what_the_readme_says():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks("python")[0], {})
    assert (
        f"This prints `{printed.getvalue().strip()}`"
        in (ROOT / "README.md").read_text()
    )


def test_second_example_compiles():
    compile(blocks("python")[1], "README.md", "exec")
