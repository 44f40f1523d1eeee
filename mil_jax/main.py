"""Command line: one stage of one config.

python -m mil_jax.main --config=configs/llama3_8b_mamba_50.py:stage=distill --workdir=...
"""

import functools
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from mil_jax import cli
from mil_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
    """Declares what the command line may say."""
    config_flags.DEFINE_config_file(
        "config",
        help_string="File and arguments, as configs/demo.py:stage=distill.",
        lock_config=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of all stages of one run.", flag_values=values
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the processes of a cluster job (jax.distributed).",
        flag_values=values,
    )


def main(given: flags.FlagValues, argv: Sequence[str]) -> None:
    """Runs the stage."""
    del argv
    config = cli.read_config(given["config"])
    if not given.workdir:
        raise UserError("flag --workdir is missing; see --help")
    # Imported here, so that --help and a wrong flag answer at once.
    import jax

    from mil_jax.train.stages import run_stage

    if given.distributed:
        jax.distributed.initialize()
    path = run_stage(config, given.workdir)
    if jax.process_index() == 0:
        print(f"{config.stage.name}: {path}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run_app(
        functools.partial(main, flags.FLAGS),
        after_stop="the same command goes on with what is finished",
    )
