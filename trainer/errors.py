"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Something the user caused: printed as one line, exit code 2, no traceback.

    The message says what happened, where, what was expected and what to do.
    """
