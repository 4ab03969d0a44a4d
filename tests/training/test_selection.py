"""Evaluations while training, held in memory or streamed, give the same figures."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from predicting import predict_split

from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import LossConfig, ModelConfig, OptimizerConfig
from trainer.run_config import TrainConfig
from trainer.training.losses import make_loss
from trainer.training.optimizer import AdamW
from trainer.training.run_record import RunRecord
from trainer.training.selection import BestCheckpoint, Evaluation
from trainer.training.step import TrainStep


@pytest.fixture(scope="module")
def evaluation(corpus):
    """Of the test split by an untrained model whose logits differ, under weights of 1 to 5."""
    metadata = load_metadata(corpus)
    packing = choose_packing(metadata.split("test").length_histogram, 2048)
    num_labels = len(metadata.labels)
    sizes = ModelConfig(
        1024,
        num_labels,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    model = build_model(sizes, seed=1)
    model.head.classifier.kernel.assign(model.head.classifier.kernel * 200.0)
    optimizer = AdamW(OptimizerConfig(learning_rate=1e-4), model.named_variables(), 1, 100)
    weights = np.linspace(1, 5, num_labels, dtype=np.float32)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    loss = make_loss(LossConfig(), weights, np.ones(num_labels), [1] * num_labels, 100)
    step = TrainStep(strategy, model, optimizer, packing, loss, 7, False)
    record = RunRecord(
        TrainConfig(data_dir=corpus, model_dir="unused", eval_split="test"), sizes, packing,
        metadata.labels, tuple(weights.tolist()), (1.0,) * num_labels, True, 128, 100, "d", "t",
        "float32", 1, {},
    )  # fmt: skip
    return Evaluation(record, metadata, step, strategy)


def test_streamed_figures_are_the_exact_ones(evaluation, monkeypatch):
    exact = evaluation.run()
    monkeypatch.setattr("trainer.evaluation.measurement.EXACT_MEMORY", 0.0)
    monkeypatch.setattr("trainer.model.predictor._BLOCK_DOCUMENTS", 30)
    streamed = evaluation.run()
    assert streamed["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    for name in ("micro_f1", "macro_f1"):
        assert streamed[name] == pytest.approx(exact[name], abs=1e-12), name
    for name in ("mean_average_precision", "micro_average_precision"):
        assert streamed[name] == pytest.approx(exact[name], abs=0.01), name


def test_blocks_hold_every_document_once(corpus, evaluation, monkeypatch):
    """Whatever their size, blocks are the split's documents, in order within each."""
    metadata = load_metadata(corpus)
    predictor = evaluation._predictor
    assert isinstance(predictor, Predictor)
    whole = predict_split(predictor, corpus, metadata, "test")
    assert whole.indices.tolist() == list(range(metadata.split("test").documents))
    monkeypatch.setattr("trainer.model.predictor._BLOCK_DOCUMENTS", 30)
    blocks = list(predictor.predict_blocks(corpus, metadata, "test"))
    assert len(blocks) >= 3
    found = np.concatenate([block.indices for block in blocks])
    assert sorted(found.tolist()) == whole.indices.tolist()
    for block in blocks:
        assert np.all(np.diff(block.indices) > 0)
        for item in dataclasses.fields(block):
            mine, all_of_them = getattr(block, item.name), getattr(whole, item.name)
            assert len(mine) == len(block.indices)
            np.testing.assert_array_equal(mine, np.array(all_of_them)[block.indices])


@pytest.mark.parametrize(
    ("start", "waits"), [(None, [0, 1, 0, 1, 2]), (0.2, [0, 1, 0, 1, 2]), (0.9, [0, 1, 2, 3, 4])]
)
def test_the_evaluation_of_a_start_is_compared_with_and_not_counted(start, waits):
    """Evaluations without a gain, after each one of five: patience of 2 ends a run at 2 of them."""
    config = TrainConfig(data_dir="d", model_dir="m", patience=2)
    selection = BestCheckpoint()
    if start is not None:
        assert selection.update(config, {"mean_average_precision": start}, is_of_start=True)
        assert (int(selection.evaluations), int(selection.without_gain)) == (0, 0)
    values = (0.5, 0.4, 0.6, 0.6, 0.3)
    for number, (value, wait) in enumerate(zip(values, waits, strict=True), 1):
        is_best = selection.update(config, {"mean_average_precision": value})
        assert is_best == (start != 0.9 and value in (0.5, 0.6) and number < 4)
        assert (int(selection.evaluations), int(selection.without_gain)) == (number, wait)
        assert selection.is_finished(config, 10, 100) == (wait >= 2)
    assert float(selection.best) == (start if start == 0.9 else 0.6)
