"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """A wrong input, flag, file or folder.

    The message is a single line that names the thing and says what to do about it; the
    command-line entry points print it without a traceback and exit with status 2.
    """
