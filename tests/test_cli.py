"""The command line as a user meets it: one line, status 2, and what to do about it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checks import process

ROOT = Path(__file__).parents[1]


def _run(*args, module="mil_jax.main", cwd=ROOT):
    env = process.environment("") | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def _error(*args, **kwargs):
    """Returns the one line of a command that must fail."""
    done = _run(*args, **kwargs)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


CONFIG = "--config=configs/tiny.py"
STAGES = "pseudo_labels, distill, sft, dpo, draft, export, evaluate"


class TestFlags:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((), "flag --config is missing; see --help"),
            (("--workdir={tmp}",), "flag --config is missing; see --help"),
            ((CONFIG,), "flag --workdir is missing; see --help"),
            (
                (CONFIG, "--workdir={tmp}", "sft"),
                "unexpected argument 'sft'; flags start with --",
            ),
            (
                (CONFIG, "--workdri={tmp}"),
                "Unknown command line flag 'workdri'. Did you mean: workdir ?; see --help",
            ),
            (
                ("--config=configs/nope.py", "--workdir={tmp}"),
                "the file of --config cannot be read (No such file or directory: "
                "'configs/nope.py'); give a path such as configs/demo.py:stage=distill",
            ),
            (
                ("--config=configs/nope.py", "--config.seed=1", "--workdir={tmp}"),
                "the file of --config cannot be read (No such file or directory: "
                "'configs/nope.py'); give a path such as configs/demo.py:stage=distill",
            ),
            (
                (CONFIG, "--config.nope=1", "--workdir={tmp}"),
                "unknown config key 'nope' in --config.nope; RunConfig in "
                "mil_jax/config.py lists all",
            ),
            (
                (CONFIG, "--config.stage.batch_siz=1", "--workdir={tmp}"),
                "unknown config key 'batch_siz' in --config.stage.batch_siz; did you mean "
                "'batch_size'?",
            ),
            (
                (CONFIG + ":stage=nope", "--workdir={tmp}"),
                f"unknown stage 'nope'; this config has {STAGES}",
            ),
            (
                (CONFIG + ":nope=1", "--workdir={tmp}"),
                "unknown config argument 'nope'; known: stage, mixer",
            ),
            (
                (CONFIG + ":mixer=rnn", "--workdir={tmp}"),
                "config key conversion.mixer is 'rnn'; expected one of ('mamba', 'mamba2')",
            ),
            (
                (CONFIG, "--config.stage.batch_size=many", "--workdir={tmp}"),
                "--config.stage.batch_size is 'many'; expected an integer",
            ),
            (
                (CONFIG, "--config.stage.batch_size.x=1", "--workdir={tmp}"),
                "config key stage.batch_size has no keys of its own: stage.batch_size.x",
            ),
            (
                (CONFIG, "--config.conversion.steps=((0,", "--workdir={tmp}"),
                "--config.conversion.steps is '((0,'; expected a tuple such as (0,1) or "
                "((0,),(0,2))",
            ),
            (
                (CONFIG, "--config.stage=distill", "--workdir={tmp}"),
                "--config.stage is 'distill'; expected single keys, as "
                "--config.stage.batch_size=8",
            ),
            (
                (CONFIG, "--config.architecture.d_ff=3", "--workdir={tmp}"),
                "config key architecture.d_ff cannot be given as a flag, for it has no "
                "value in the config file; set it there",
            ),
            (
                (CONFIG, "--config.compute.implementation=triton", "--workdir={tmp}"),
                "config key compute.implementation is 'triton'; expected one of ('auto', "
                "'pallas_triton', 'xla_chunked', 'reference')",
            ),
            (
                ("--config=README.md", "--workdir={tmp}"),
                "the file of --config, README.md, is no Python file; give one such as "
                "configs/demo.py:stage=distill",
            ),
            (
                (CONFIG, "--config.stage.accumulate=3", "--workdir={tmp}"),
                "stage.accumulate (3) does not divide stage.batch_size (4)",
            ),
            (
                (CONFIG, "--config.conversion.steps=((0,),(1,))", "--workdir={tmp}"),
                "conversion.steps[1] must hold all layers of step 0; missing [0]",
            ),
            (
                (CONFIG, "--config.conversion.steps=((0,),('a',))", "--workdir={tmp}"),
                "config key conversion.steps[1][0] is 'a' (str); expected int",
            ),
        ],
    )
    def test_one_line(self, tmp_path, args, message):
        args = [arg.format(tmp=tmp_path / "work") for arg in args]
        assert _error(*args) == message
        assert not (tmp_path / "work").exists()

    def test_help(self):
        done = _run("--help")
        assert "--config: File and arguments" in done.stdout
        assert "--workdir: Folder of all stages of one run." in done.stdout

    def test_config_that_needs_another_folder(self, tmp_path):
        """The configs import each other, so they are found from the root only."""
        shutil.copy(ROOT / "configs" / "tiny.py", tmp_path / "tiny.py")
        code = (
            "import sys; sys.path.remove(''); import runpy; "
            "sys.argv = ['main', '--config=tiny.py', '--workdir=w']; "
            f"sys.path.append({str(tmp_path / 'site')!r}); "
            "runpy.run_module('mil_jax.main', run_name='__main__')"
        )
        (tmp_path / "site").mkdir()
        os.symlink(ROOT / "mil_jax", tmp_path / "site" / "mil_jax")
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=process.environment("") | {"PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=100,
        )
        if done.returncode == 2:
            assert done.stderr == (
                "error: the config file needs a module that is not there (No module named "
                "'configs'); run from the folder that holds configs/\n"
            )
        else:
            # With an editable install the configs are importable from anywhere.
            assert "stage distill trains on w/pseudo_labels/data" in done.stderr

    def test_slip_in_a_config_shows_its_place(self, tmp_path):
        """An error of a config's author, not of its user: the traceback helps."""
        file = tmp_path / "mine.py"
        file.write_text("def get_config(arg=''):\n    return int('one')\n")
        done = _run(f"--config={file}", f"--workdir={tmp_path}")
        assert done.returncode == 1
        assert "line 2, in get_config" in done.stderr and "'one'" in done.stderr


class TestEnds:
    """Programs under `run_app` that fail or are stopped."""

    PROGRAM = """
import os, pathlib, resource, signal, sys
from mil_jax import cli

def main(argv):
    what = pathlib.Path.cwd().name
    if what == "checkpoint":
        import numpy as np
        from mil_jax.checkpoint.orbax_io import RunCheckpoints
        checkpoints = RunCheckpoints(pathlib.Path("steps"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, -1))
        checkpoints.save(1, {"a": np.random.default_rng(0).normal(size=500_000)}, {})
        checkpoints.close()
    elif what == "answer":
        print("pig")
    elif what == "worker":
        raise BrokenPipeError(32, "Broken pipe")
    elif what == "file":
        raise PermissionError(13, "Permission denied", "answers")
    else:
        os.kill(os.getpid(), getattr(signal, what))

cli.run_app(main, after_stop="the same command goes on")
"""

    def _run(self, folder, *args, stdout=subprocess.PIPE, **changes):
        """Runs the program, or what is given, in a new folder that says what it does."""
        folder.mkdir()
        return subprocess.run(
            [sys.executable, *(args or ("-c", self.PROGRAM))],
            cwd=folder,
            env=process.environment("") | {"PYTHONPATH": str(ROOT)} | changes,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )

    @pytest.mark.parametrize(
        ("what", "status", "message"),
        [
            (
                "checkpoint",
                2,
                "error: cannot write steps (File too large); free some space, the same "
                "command then goes on from the start",
            ),
            (
                "file",
                2,
                "error: answers: Permission denied; check the disk and your rights",
            ),
            ("SIGTERM", 143, "stopped by SIGTERM; the same command goes on"),
            ("SIGINT", 130, "stopped by SIGINT; the same command goes on"),
        ],
    )
    def test_one_line(self, tmp_path, what, status, message):
        """Nothing of what Orbax prints before it raises, and no traceback."""
        done = self._run(tmp_path / what)
        assert done.returncode == status, done.stderr
        assert done.stderr.strip() == message

    def test_another_pipe_that_breaks(self, tmp_path):
        """As one to a worker: no reason to say nothing."""
        done = self._run(tmp_path / "worker")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "BrokenPipeError: [Errno 32] Broken pipe"

    @pytest.mark.parametrize(
        "args",
        [("-m", "mil_jax.main", "--help"), ("-c", PROGRAM)],
        ids=["help", "answer"],
    )
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_output_that_nobody_reads(self, tmp_path, args, unbuffered):
        """As of `--help | head`, when `head` has ended; told at the end or at once."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stdout:
            done = self._run(
                tmp_path / "answer", *args, stdout=stdout, PYTHONUNBUFFERED=unbuffered
            )
        assert done.returncode == 128 + signal.SIGPIPE
        assert done.stderr == ""


class TestStages:
    def test_missing_stage_before(self, tmp_path):
        labels = tmp_path / "pseudo_labels" / "data"
        assert _error(CONFIG, f"--workdir={tmp_path}") == (
            f"stage distill trains on {labels}, which is not there: run "
            "stage=pseudo_labels first"
        )

    def test_workdir_of_another_config(self, tmp_path):
        """And an unfinished stage may be left and taken up."""
        args = (CONFIG + ":stage=sft", f"--workdir={tmp_path}")
        assert "run stage=distill first" in _error(*args)
        (tmp_path / "sft" / "checkpoints").mkdir()
        message = _error(*args, "--config.stage.optimizer.lr=0.5")
        assert message == (
            f"{tmp_path}/sft holds work of another config: stage.optimizer.lr was 0.0002, "
            "now 0.5; choose another --workdir, or delete that folder to start over"
        )

    def test_success_prints_the_folder(self, tmp_path):
        """And only this program's own lines, with a bar per stage, on stderr."""
        done = _run(
            CONFIG + ":stage=draft",
            f"--workdir={tmp_path}",
            "--config.stage.length=64",
            "--config.stage.max_steps=1",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"draft: {tmp_path}/draft/model\n"
        lines = done.stderr.replace("\r", "\n").splitlines()
        bars = ("draft:", "tokenize:")
        messages = [
            line for line in lines if line.strip() and not line.startswith(bars)
        ]
        assert len(messages) == 2
        assert messages[0].endswith("of 16 records cut to 64 tokens")
        assert messages[1].startswith("16 examples in ")
        assert (tmp_path / "draft" / "model" / "model_config.json").exists()
