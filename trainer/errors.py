"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Something the user caused: printed as one line, exit code 2, no traceback.

    The message says what happened, where, what was expected and what to do.
    """


class RunAgain(Exception):
    """A run that ended early with nothing lost: the same command goes on where it stopped.

    Its message is one line, shown without a traceback; the command exits with code 75.
    """
