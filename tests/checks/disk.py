"""A disk that is full, for real: files stop growing at a size."""

import contextlib
import resource


@contextlib.contextmanager
def limited(num_bytes):
    """No file of this process grows beyond `num_bytes`; its writer gets EFBIG.

    Python ignores the signal that comes with it. Leave room for what pytest captures.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
