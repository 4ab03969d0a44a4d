"""A worker's fault that a user can see to, carried through Beam as one line.

A runner hands an exception of a worker on as the text of its traceback, and each runner does so in
its own way. What the command line would have said of it is put into that text as JSON behind a
marker, and looked for there.
"""

import contextlib
import json
from collections.abc import Iterator

from trainer.errors import RunAgain, UserError
from trainer.storage import filesystem

_MARKER = "multihot-fault:"


class WorkerFault(Exception):
    """A UserError, RunAgain or OSError on its way from a worker to the command."""


@contextlib.contextmanager
def marked_faults() -> Iterator[None]:
    """Marks what is raised in the block and has a line of its own on the command line.

    Raises:
      WorkerFault: in the place of a UserError, a RunAgain, an OSError, or what TensorFlow says of a
        store that does not answer.
    """
    try:
        yield
    except (UserError, RunAgain, OSError) as error:
        raise _marked(error) from None
    except Exception as error:
        of_store = filesystem.explain(error)
        if of_store is None:
            raise
        raise _marked(of_store) from None


def _marked(error: Exception) -> WorkerFault:
    if isinstance(error, OSError) and error.errno is not None:
        fault = {"errno": error.errno, "message": error.strerror, "file": error.filename}
    else:
        fault = {"again": isinstance(error, RunAgain), "message": str(error)}
    return WorkerFault(_MARKER + json.dumps(fault))


def find_fault(error: BaseException) -> Exception | None:
    """The exception that a worker marked, if it is why a pipeline failed."""
    text = str(error)
    start = text.find(_MARKER)
    if start < 0:
        return None
    try:
        fault, _ = json.JSONDecoder().raw_decode(text, start + len(_MARKER))
    except ValueError:  # A runner that cut or quoted the text; its own words have to do.
        return UserError(text[start + len(_MARKER) :].partition("\n")[0])
    if "errno" in fault:
        return OSError(fault["errno"], fault["message"], fault["file"])
    return RunAgain(fault["message"]) if fault["again"] else UserError(fault["message"])
