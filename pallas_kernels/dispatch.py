"""Picks one of an operation's implementations and logs, once, which one ran."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)


class UnsupportedError(NotImplementedError):
    """An implementation does not run on this platform, dtype or shape."""


@functools.cache
def _log_once(op: str, name: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s: running %s", op, "; ".join((name, *reasons)))


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns the operation's result from the implementation asked for.

    Args:
      op: Name of the operation, for messages.
      implementations: Name to function, the fastest first. A function that cannot run
        here raises `UnsupportedError` before it does any work.
      implementation: None for the first one that runs; a name for that one or an error.
      *args: Passed on.
      **kwargs: Passed on.

    Raises:
      ValueError: There is no implementation of that name.
      NotImplementedError: The named implementation does not run here.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op}: implementation {implementation!r} is not one of "
                f"{', '.join(implementations)}"
            )
        result = implementations[implementation](*args, **kwargs)
        _log_once(op, implementation, ())
        return result
    reasons: tuple[str, ...] = ()
    for name, function in implementations.items():
        try:
            result = function(*args, **kwargs)
        except UnsupportedError as error:
            reasons += (f"{name} was passed over ({error})",)
            continue
        _log_once(op, name, reasons)
        return result
    raise UnsupportedError(f"{op}: nothing runs here: {'; '.join(reasons)}")
