"""The loss of a student against the formula in float64."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.model_config import LossConfig
from trainer.training.distillation import Distillation, batch_loss
from trainer.training.losses import make_loss

DOCUMENTS, LABELS = 11, 6
POS_WEIGHTS = np.array([1, 0.3, 5, 100, 2, 17], np.float32)
SHIFT = np.log(POS_WEIGHTS)


def soft_sum(logits, teacher_logits, mask, temperature, shift=SHIFT):
    """T² sum_d m_d mean_l -(s log p + (1 - s) log(1 - p)), p = σ(z / T), s = σ((t + shift) / T)."""
    z = np.asarray(logits, np.float64) / temperature
    target = 1 / (1 + np.exp(-(np.asarray(teacher_logits, np.float64) + shift) / temperature))
    per_label = target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z)
    return temperature**2 * float((per_label.mean(axis=1) * mask).sum())


def hard_sum(logits, labels, mask):
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    per_label = POS_WEIGHTS * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    return float((per_label.mean(axis=1) * mask).sum())


def make(alpha, temperature):
    ones = np.ones(LABELS)
    loss = make_loss(LossConfig(), POS_WEIGHTS, ones, ones, 100)
    return batch_loss(loss, Distillation(alpha, temperature, SHIFT))


@pytest.fixture
def batch():
    """Eight documents with labels, two without, one empty slot."""
    random = np.random.default_rng(5)
    logits = random.normal(0, 4, (DOCUMENTS, LABELS)).astype(np.float32)
    logits[0] = [80, -80, 500, -500, 1e4, -1e4]
    labels = (random.random((DOCUMENTS, LABELS)) < 0.4).astype(np.float32)
    teacher_logits = random.normal(-1, 3, (DOCUMENTS, LABELS)).astype(np.float32)
    mask = np.ones(DOCUMENTS, np.float32)
    labelled = np.ones(DOCUMENTS, np.float32)
    mask[7] = labelled[7] = 0
    labelled[[2, 9]] = 0
    tensors = {"document_mask": mask, "label_mask": labelled, "teacher_logits": teacher_logits}
    return logits, labels, {name: tf.constant(value) for name, value in tensors.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_and_gradient_equal_the_formula(batch, alpha, temperature):
    logits, labels, tensors = batch
    mask, labelled = (tensors[name].numpy() for name in ("document_mask", "label_mask"))
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        total, count = make(alpha, temperature)(variable, tf.constant(labels), tensors)
    soft = soft_sum(logits, tensors["teacher_logits"], mask, temperature)
    hard = hard_sum(logits, labels, mask * labelled)
    assert float(count) == DOCUMENTS - 1
    assert float(total) == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-6)

    def sigmoid(z):
        return np.exp(-np.logaddexp(0, -z.astype(np.float64)))

    ours = sigmoid(logits / temperature)
    theirs = sigmoid((tensors["teacher_logits"].numpy() + SHIFT) / temperature)
    of_soft = temperature * (ours - theirs) * mask[:, None] / LABELS
    of_hard = (1 - labels) * sigmoid(logits) - POS_WEIGHTS * labels * sigmoid(-logits)
    of_hard *= (mask * labelled)[:, None] / LABELS
    expected = alpha * of_soft + (1 - alpha) * of_hard
    np.testing.assert_allclose(tape.gradient(total, variable), expected, rtol=1e-4, atol=1e-6)


def test_the_loss_is_least_where_the_student_has_the_teachers_odds_and_the_weights(batch):
    """At any temperature, so that calibration takes the positive weights back exactly."""
    _, _, tensors = batch
    teacher_logits = tensors["teacher_logits"].numpy()
    variable = tf.Variable(teacher_logits + SHIFT)
    with tf.GradientTape() as tape:
        total, _ = make(1.0, 3.0)(variable, tf.zeros([DOCUMENTS, LABELS]), tensors)
    np.testing.assert_allclose(tape.gradient(total, variable), 0, atol=1e-6)


def test_labels_of_documents_without_labels_count_nothing(batch):
    logits, labels, tensors = batch
    found = []
    for value in (0, 1):
        labels[[2, 9]] = value
        variable = tf.Variable(logits)
        with tf.GradientTape() as tape:
            total, count = make(0.4, 2.0)(variable, tf.constant(labels), tensors)
        found.append((float(total), float(count), tape.gradient(total, variable).numpy()))
    assert found[0][:2] == found[1][:2]
    np.testing.assert_array_equal(found[0][2], found[1][2])
    # Their gradient is the teacher's term alone.
    assert np.abs(found[0][2][[2, 9]]).min() > 0


def test_empty_slots_count_nothing_even_if_their_logits_are_nan(batch):
    logits, labels, tensors = batch
    expected = float(make(0.5, 2.0)(tf.constant(logits), tf.constant(labels), tensors)[0])
    logits[7] = np.nan
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        total, _ = make(0.5, 2.0)(variable, tf.constant(labels), tensors)
    assert float(total) == expected
    gradient = tape.gradient(total, variable).numpy()
    assert np.isfinite(gradient).all() and not gradient[7].any()


def test_without_a_teacher_it_is_the_loss_itself(batch):
    logits, labels, tensors = batch
    ones = np.ones(LABELS)
    loss = make_loss(LossConfig(), POS_WEIGHTS, ones, ones, 100)
    of_batch = batch_loss(loss, None)(tf.constant(logits), tf.constant(labels), tensors)
    expected = loss(tf.constant(logits), tf.constant(labels), tensors["document_mask"])
    assert [float(item) for item in of_batch] == [float(item) for item in expected]
