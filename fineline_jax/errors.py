"""The one exception for bad input, which the user can correct."""


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or flag and the remedy.

    The command line prints it without a traceback and exits with `exit_status`.
    """

    exit_status = 2


class Incomplete(UserError):
    """What could be done is done and stays; the message names what was left out."""

    exit_status = 1
