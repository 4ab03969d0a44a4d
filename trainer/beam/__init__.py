"""The same `prepare` and `score` as Apache Beam pipelines; Beam is imported only when asked for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.config import LOCAL_RUNNER

if TYPE_CHECKING:
    from trainer.beam.runners import BeamRunner


def open_runner(name: str, options: Sequence[str]) -> "BeamRunner | None":
    """The runner of `--runner` with its `--beam_options`; None where the command runs by itself.

    Raises:
      UserError: if Beam has no such runner or option.
    """
    if name == LOCAL_RUNNER:
        return None
    from trainer.beam.runners import BeamRunner

    return BeamRunner(name, options)
