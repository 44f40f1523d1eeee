"""The disk: what a failed write says, locks, and bytes that are really there."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mil_jax.errors import UserError

_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RIGHTS = (errno.EROFS, errno.EACCES, errno.EPERM)
# What a user can mend, or at least must hear of.
IN_THE_WAY = (*_SPACE, *_RIGHTS, errno.EIO)


def try_lock(descriptor: int) -> bool:
    """Takes an open file or folder until it is closed; False if another one has it.

    Where the file system has no locks, nobody is kept away.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Turns what the system says about a failed write into one line.

    Args:
        path: What is being written.
        then: What the same command does once that is mended.

    Raises:
        UserError: The body failed at the disk, whichever library wrote to it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = system_error(error)
        if code is None:
            raise
        what = "choose another place"
        if code in _SPACE:
            what = "free some space"
        elif code in _RIGHTS:
            what = f"make it writable or {what}"
        raise UserError(
            f"cannot write {path} ({os.strerror(code)}); {what}{then and f', {then}'}"
        ) from error


def system_error(error: BaseException) -> int | None:
    """Returns the system's error number behind an exception, if there is one.

    Libraries that write from C++ or Rust tell it in words alone.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno:
            return found.errno
        for code in IN_THE_WAY:
            if os.strerror(code) in str(found):
                return code
        found = found.__cause__
    return None


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
