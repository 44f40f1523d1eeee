"""unit: the launch scripts parse, and their dry run prints the command they would run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("launch/local.sh", "launch/slurm.sh")
ARGUMENTS = (
    "--config=configs/demo.py:stage=distill",
    "--workdir=build/a folder",
    "--config.stage.optimizer.lr=1e-3",
)


def bash(*command: str, **env: str) -> subprocess.CompletedProcess:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "SLURM_"))
    }
    return subprocess.run(
        ["bash", *command],
        cwd=ROOT,
        env=clean | {"PYTHON": sys.executable} | env,
        capture_output=True,
        text=True,
    )


def dry_run(script: str, **env: str) -> list[str]:
    run = bash(script, "--dry-run", *ARGUMENTS, **env)
    assert run.returncode == 0, run.stderr
    return shlex.split(run.stdout)


@pytest.mark.parametrize("script", [*SCRIPTS, "launch/env.sh", "launch/dry_run.sh"])
def test_script_parses(script):
    assert bash("-n", script).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable(script):
    assert os.access(ROOT / script, os.X_OK)


def test_local_passes_arguments_on():
    assert dry_run("launch/local.sh") == [
        sys.executable,
        "-m",
        "mil_jax.main",
        *ARGUMENTS,
    ]


def test_slurm_runs_one_process_per_gpu():
    words = dry_run("launch/slurm.sh", SLURM_CPUS_PER_TASK="5")
    assert words[:4] == [
        "srun",
        "--kill-on-bad-exit=1",
        "--gpu-bind=none",
        "--cpus-per-task=5",
    ]
    assert words[4:] == [
        sys.executable,
        "-m",
        "mil_jax.main",
        "--distributed",
        *ARGUMENTS,
    ]
    header = (ROOT / "launch/slurm.sh").read_text()
    values = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in header.splitlines()
        if line.startswith("#SBATCH")
    )
    assert values["ntasks-per-node"] == values["gpus-per-node"]


def test_slurm_refuses_another_folder(tmp_path):
    run = bash("launch/slurm.sh", "--dry-run", SLURM_SUBMIT_DIR=str(tmp_path))
    assert run.returncode == 2
    assert "root of the repository" in run.stderr


def test_local_runs_the_program():
    run = bash("launch/local.sh", "--config=configs/demo.py:stage=distill")
    assert run.returncode == 2
    assert run.stderr.strip() == "error: flag --workdir is missing; see --help"


def test_environment_keeps_what_is_set():
    script = 'source launch/env.sh; echo "$XLA_FLAGS|$XLA_PYTHON_CLIENT_MEM_FRACTION"'
    run = bash(
        "-euc", script, XLA_FLAGS="--xla_a=1", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5"
    )
    flags, fraction = run.stdout.strip().split("|")
    assert flags.split()[-1] == "--xla_a=1"  # The last one wins.
    assert fraction == "0.5"


def test_this_jax_accepts_the_flags():
    # An unknown flag ends the process.
    script = 'source launch/env.sh; exec "$PYTHON" -c "import jax; jax.devices()"'
    run = bash("-euc", script, JAX_PLATFORMS="cpu")
    assert run.returncode == 0, run.stderr
