"""Command line: one stage of one config.

python -m mil_jax.main --config=configs/llama3_8b_mamba_50.py:stage=distill --workdir=...
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from mil_jax import cli
from mil_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="File and arguments, as configs/demo.py:stage=distill.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all stages of one run.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes of a cluster job (jax.distributed)."
)


def main(argv: Sequence[str]) -> None:
    """Runs the stage."""
    del argv
    config = cli.read_config(_CONFIG)
    if not _WORKDIR.value:
        raise UserError("flag --workdir is missing; see --help")
    # Imported here, so that --help and a wrong flag answer at once.
    import jax

    from mil_jax.train.stages import run_stage

    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    path = run_stage(config, _WORKDIR.value)
    if jax.process_index() == 0:
        print(f"{config.stage.name}: {path}")


if __name__ == "__main__":
    cli.run_app(main, after_stop="the same command goes on with what is finished")
