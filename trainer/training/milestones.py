"""Where the loop of steps ends: at an evaluation, a checkpoint, or to show progress."""

import math
from dataclasses import dataclass

from trainer.config import TrainConfig

_CHECKPOINTS_A_RUN = 10


@dataclass(frozen=True)
class Milestones:
    """The counts of documents and steps at which a run does something beside steps.

    Evaluations and, by default, checkpoints are due at counts of documents, because the number of
    steps of an epoch is not known beforehand.
    """

    total_documents: int
    documents_per_evaluation: float
    documents_per_checkpoint: int
    steps_per_checkpoint: int | None
    steps_per_loop: int

    @classmethod
    def of(
        cls, config: TrainConfig, num_documents: int, total_documents: int, steps_per_loop: int
    ) -> "Milestones":
        """Those of a run over `num_documents` an epoch and `total_documents` in all."""
        return cls(
            total_documents,
            config.evaluate_every * num_documents,
            math.ceil(total_documents / _CHECKPOINTS_A_RUN),
            config.checkpoint_every,
            steps_per_loop,
        )

    def next_evaluation(self, evaluations: int) -> int:
        """Documents at which the next evaluation is due, `evaluations` done."""
        due = math.ceil((evaluations + 1) * self.documents_per_evaluation)
        return min(due, self.total_documents)

    def next_stop(self, steps: int, documents: int, evaluations: int) -> tuple[int, int]:
        """(most steps, documents until which) to go on from here in one loop on the device."""
        until = self.next_evaluation(evaluations)
        if self.steps_per_checkpoint:
            left = self.steps_per_checkpoint - steps % self.steps_per_checkpoint
            return min(self.steps_per_loop, left), until
        every = self.documents_per_checkpoint
        return self.steps_per_loop, min(until, (documents // every + 1) * every)

    def is_checkpoint_due(self, steps: int, documents: int, documents_before: int) -> bool:
        """Whether a loop that began at `documents_before` ended where a checkpoint is due."""
        if self.steps_per_checkpoint:
            return steps % self.steps_per_checkpoint == 0
        every = self.documents_per_checkpoint
        return documents // every > documents_before // every
