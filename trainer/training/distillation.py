"""The loss of a student: its teacher's scores beside the labels.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), whose softmax
over classes is here a sigmoid for each label.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.training.losses import Loss, cross_entropy

# A micro-batch: tensors by name.
Batch = dict[str, tf.Tensor]
BatchLoss = Callable[[tf.Tensor, tf.Tensor, Batch], tuple[tf.Tensor, tf.Tensor]]


@dataclass(frozen=True)
class Distillation:
    """How much a student goes by its teacher, and where its logits lie.

    `alpha` and `temperature` are --distill_alpha and --distill_temperature. `shift` (float [L]) is
    what the student's logits have beyond log-odds: log(positive weight), less the loss's own
    offset. The teacher's are log-odds, for its calibration is folded into its weights.
    """

    alpha: float
    temperature: float
    shift: np.ndarray

    def sum_documents(
        self, logits: tf.Tensor, teacher_logits: tf.Tensor, document_mask: tf.Tensor
    ) -> tf.Tensor:
        """The sum over documents of T² times the cross-entropy with the teacher's sigmoids.

        Both are taken at temperature T, and a document's is the mean over labels. The factor keeps
        the gradient's size at any T. Logits are [D, L], `document_mask` [D]; float32 scalar.
        """
        mask = tf.cast(document_mask, tf.float32)
        real = mask[:, None] > 0
        teacher_logits = teacher_logits + tf.constant(self.shift, tf.float32)
        ours, theirs = (
            # Selecting first keeps 0 x NaN out of the gradient, as in `losses`.
            tf.where(real, tf.cast(item, tf.float32), 0.0) / self.temperature
            for item in (logits, teacher_logits)
        )
        positive, negative = cross_entropy(ours)
        target = tf.sigmoid(theirs)
        per_label = target * positive + (1 - target) * negative
        return self.temperature**2 * tf.reduce_sum(tf.reduce_mean(per_label, axis=-1) * mask)


def batch_loss(loss: Loss, distillation: Distillation | None) -> BatchLoss:
    """The loss of a micro-batch: of logits and labels, [D, L] each, and its other tensors.

    With a teacher it is alpha times the teacher's term, and 1 - alpha times `loss` of the documents
    that have labels. The number of documents counts all of them.
    """

    if distillation is None:
        return lambda logits, labels, batch: loss(logits, labels, batch["document_mask"])
    teacher_term, share = distillation.sum_documents, distillation.alpha

    def of_both(logits: tf.Tensor, labels: tf.Tensor, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        mask = batch["document_mask"]
        hard, _ = loss(logits, labels, mask * batch["label_mask"])
        soft = teacher_term(logits, batch["teacher_logits"], mask)
        return share * soft + (1 - share) * hard, tf.reduce_sum(tf.cast(mask, tf.float32))

    return of_both
