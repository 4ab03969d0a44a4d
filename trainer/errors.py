"""The errors that end a command, and their exit codes."""

NOT_CHECKED = 1
USER_FAULT = 2
DOES_NOT_FIT = 3
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command is expected to succeed later.
INTERRUPTED = 130  # What a shell says of a program that SIGINT ended.


class UserError(ValueError):
    """Something the user caused: printed as one line, exit code 2, no traceback.

    The message says what happened, where, what was expected and what to do.
    """

    exit_code = USER_FAULT


class NotChecked(Exception):
    """Nothing is known to be wrong, but something could not be looked at: one line, exit code 1."""

    exit_code = NOT_CHECKED


class DoesNotFit(Exception):
    """A step needs more memory than its accelerator has: one line, exit code 3, no traceback."""

    exit_code = DOES_NOT_FIT


class RunAgain(Exception):
    """The run stopped through no fault of its own: one line, exit code 75, no traceback.

    A machine or a worker was lost, say. The same command resumes from the last checkpoint.
    """

    exit_code = RUN_AGAIN


def shorten(name: str, length: int = 100) -> str:
    """A name, or its beginning and "...": at most `length` characters, for messages and tables.

    Names of labels and ids of documents come from users and may be of any length.
    """
    return name if len(name) <= length else f"{name[: length - 3]}..."
