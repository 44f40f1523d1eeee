"""What all commands share: flags, logging and one-line errors."""

import contextlib
import importlib.util
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from mil_jax import disk
from mil_jax.config import RunConfig, from_config_dict
from mil_jax.errors import UserError


def run_app(entry: Callable[[Sequence[str]], None], *, after_stop: str = "") -> None:
    """Runs `entry` under absl; what a user can mend becomes one line.

    The exit status is 2 after an error and, as shells have it, 128 and a signal's number:
    of SIGINT (Ctrl-C) or SIGTERM, which both end `entry` by a `KeyboardInterrupt`, or of
    SIGPIPE, once nobody reads the output.

    Args:
        entry: Gets the arguments.
        after_stop: What a user may do after one of these signals.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    received = [signal.SIGINT]

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags start with --")
        _set_up_logging()
        signal.signal(signal.SIGTERM, stop)
        entry(argv)

    try:
        with _stopped_with_its_reader():
            app.run(run, flags_parser=_parse_flags)
    except UserError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        if error.errno not in disk.IN_THE_WAY:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _end(f"error: {where}{error.strerror}; check the disk and your rights", 2)
    except KeyboardInterrupt:
        then = f"; {after_stop}" if after_stop else ""
        _end(f"\nstopped by {received[-1].name}{then}", 128 + received[-1])


@contextlib.contextmanager
def _stopped_with_its_reader() -> Iterator[None]:
    """Ends the program without a word once nobody reads its output, as `head` may."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        watch = select.poll()
        watch.register(sys.stdout, 0)
        if not watch.poll(0):  # Another pipe than the output's.
            raise
        # What is left goes nowhere; Python would complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def read_config(flag: flags.Flag) -> RunConfig:
    """Returns the config of a `config_flags` flag, checked and frozen.

    Raises:
        UserError: The flag is missing, its file cannot be read, or a key is wrong.
    """
    if flag.value is None:
        raise UserError(f"flag --{flag.name} is missing; see --help")
    try:
        values = flag.value.to_dict()
    except OSError as error:  # Raised at the first use, not while flags are parsed.
        raise _no_config_file(error) from None
    return from_config_dict(RunConfig, values)


def _parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """Parses flags; what `ml_collections` says in pages becomes one line."""
    try:
        return flags.FLAGS(argv)
    except (UserError, BrokenPipeError):  # The latter of --help.
        raise
    except flags.Error as error:
        raise _flag_error(error) from None
    except (AttributeError, KeyError) as error:
        raise _unknown_key(error, argv) from None
    except (TypeError, ValueError) as error:
        raise _no_value(error) or _plain(error) from None
    except SyntaxError as error:
        if str(error.filename).endswith(".py"):
            raise  # A slip in the config file: its traceback shows where.
        raise UserError(
            f"the file of --config, {error.filename}, is no Python file; give one such as "
            "configs/demo.py:stage=distill"
        ) from None
    except ImportError as error:
        raise UserError(
            f"the config file needs a module that is not there ({error}); run from the "
            "folder that holds configs/"
        ) from None
    except OSError as error:
        raise _no_config_file(error) from None


# By what `ml_collections` calls the type of a value.
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a tuple such as (0,1) or ((0,),(0,2))",
    "string": "single keys, as --config.stage.batch_size=8",  # Of a group of keys.
}


def _plain(error: Exception) -> Exception:
    if isinstance(error, TypeError):
        return error  # A slip in the config file: its traceback shows where.
    return UserError(f"{' '.join(str(error).split())}; see --help")


def _no_value(error: Exception) -> UserError | None:
    """Returns what to do about a key that is None in the config, such as `architecture`."""
    found = re.search(r"NoneType.* field config\.([\w.]+)", str(error))
    found = found or re.search(r"Override ([\w.]+) can not be applied", str(error))
    if not found:
        return None
    return UserError(
        f"config key {found[1]} cannot be given as a flag, for it has no value in the "
        "config file; set it there"
    )


def _wrong_value(error: flags.Error) -> UserError | None:
    """Returns what a key of the config should be instead."""
    found = re.match(r"flag --(config\.[\w.]+)=(.*?): ", str(error), re.DOTALL)
    if not found or found[1] not in flags.FLAGS:
        return None
    expected = _EXPECTED.get(flags.FLAGS[found[1]].parser.flag_type())
    if not expected:
        return None
    return UserError(f"--{found[1]} is {found[2]!r}; expected {expected}")


def _flag_error(error: flags.Error) -> Exception:
    if known := _wrong_value(error) or _no_value(error):
        return known
    first, *rest = str(error).strip().splitlines()
    if not rest:
        return UserError(f"{first}; see --help")
    _, is_user_error, message = rest[-1].partition(f"{UserError.__name__}: ")
    if not is_user_error:
        return error  # A slip in the config file: its traceback shows where.
    return UserError(message)


def _unknown_key(error: Exception, argv: Sequence[str]) -> UserError:
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = error.args[0]
    if inside := re.search(r"Attempting to lookup: (([\w.]+)\.\w+)", text):
        raise UserError(f"config key {inside[2]} has no keys of its own: {inside[1]}")
    found = re.search(r"'(\w+)'", text)
    key = found[1] if found else text
    names = [arg.partition("=")[0] for arg in argv]
    named = [name for name in names if key in name.lstrip("-").split(".")[1:]]
    hint = re.search(r"Did you mean \W*(\w+)", text)
    remedy = (
        f"did you mean {hint[1]!r}?"
        if hint
        else "RunConfig in mil_jax/config.py lists all"
    )
    return UserError(
        f"unknown config key {key!r} in {named[0] if named else key}; {remedy}"
    )


def _no_config_file(error: OSError) -> UserError:
    found = re.search(r"\[Errno \d+\] (.*)", str(error))
    reason = found[1] if found else str(error).splitlines()[0]
    return UserError(
        f"the file of --config cannot be read ({reason}); give a path such as "
        "configs/demo.py:stage=distill"
    )


class _AboveProgressBar(logging.Handler):
    """Writes messages without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        tqdm.write(self.format(record), file=sys.stderr)


def _set_up_logging() -> None:
    """Shows this project's messages bare, and of libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax prints every failure in pages before it raises it.
    handler = absl_logging.get_absl_handler()
    handler.addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    for name in ("mil_jax", "pallas_kernels"):
        handler = _AboveProgressBar()
        handler.setFormatter(logging.Formatter("%(message)s"))
        if name == "pallas_kernels":
            handler.addFilter(_is_news)
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a kernel's message is worth a line: that none runs on a CPU is not."""
    import jax  # Here, so that --help and a wrong flag answer at once.

    return record.levelno > logging.INFO or jax.default_backend() != "cpu"


def load_config_module(path: Path) -> ModuleType:
    """Imports a config file, for commands that need several of its stages.

    Raises:
        UserError: There is no such file.
    """
    if not path.is_file():
        raise UserError(f"config {path} does not exist; run from the repository's root")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise UserError(
            f"config {path} is no Python file; give one such as configs/demo.py"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
