"""Which documents a run met in the steps whose loss or gradient was not finite."""

import itertools
from typing import Any

from trainer.data.input_pipeline import Stream, read_micro_batches
from trainer.training.step import Progress, read_position

BAD_STEPS_FILE = "bad_steps.json"


def find_bad_documents(
    stream: Stream,
    seed: int,
    num_epochs: float,
    progress: Progress,
    micro_batches_per_step: int,
) -> list[dict[str, Any]]:
    """Reads the bad steps that a run stands at the end of once more, for their documents' ids.

    Ids are strings, which do not travel to devices; the stream gives the same documents again.

    Args:
      stream, seed, num_epochs: what the run reads, as `read_micro_batches` takes them.
      progress: the run's, after at least one bad step.
      micro_batches_per_step: K.

    Returns:
      For each of the last bad steps in a row, its number `step` and its `document_ids`.
    """
    count, size = int(progress.bad_steps), micro_batches_per_step
    micro_batches = read_micro_batches(
        stream, seed=seed, num_epochs=num_epochs, start=read_position(progress.bad_from)
    )
    ids = [
        [name.decode("utf-8", "replace") for name in batch["document_id"].numpy()[mask]]
        for batch in micro_batches.take(count * size)
        for mask in [batch["document_mask"].numpy() > 0]
    ]
    first = int(progress.steps) - count + 1
    return [
        {"step": first + index, "document_ids": list(itertools.chain(*ids[start : start + size]))}
        for index, start in enumerate(range(0, len(ids), size))
    ]
