"""The one exception for bad input, which the user can correct."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or flag and the remedy.

    The command line prints it without a traceback and exits with `exit_status`.
    """

    exit_status = 2
