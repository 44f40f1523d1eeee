"""What all commands share: logging and one-line errors."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app
from absl import logging as absl_logging

from mil_jax.errors import UserError


def run_app(entry: Callable[[Sequence[str]], None]) -> None:
    """Runs `entry` under absl; user errors become one line and exit status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        app.run(lambda argv: (_set_up_logging(), entry(argv))[-1])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _set_up_logging() -> None:
    """Shows this project's messages bare, and of libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("mil_jax", "pallas_kernels"):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
