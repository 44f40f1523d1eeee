"""Progress of long work: a bar in a terminal, a plain line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

# Seconds between two lines of a log file.
LINE_SECONDS = 30.0
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(iterable: Iterable[Any] | None = None, **kwargs: Any) -> tqdm:
    """Returns a `tqdm` on stderr; its keyword arguments are passed on."""
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **kwargs)
    return tqdm(
        iterable,
        file=_Lines(sys.stderr),
        bar_format=_LINE,
        mininterval=LINE_SECONDS,
        miniters=1,  # Else tqdm guesses how many steps the interval has.
        **kwargs,
    )


class _Lines:
    """Passes on whole lines of what tqdm writes to redraw one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        """Writes a line, unless it is blank or was the last one."""
        line = text.strip()
        if line and line != self._last:
            self._stream.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        """Passes on what is buffered."""
        self._stream.flush()
