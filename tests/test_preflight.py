"""What a TPU runs compiles for one, without one: BERT-base's width, two layers, small batches."""

import dataclasses

import pytest
import tensorflow as tf

from launch.lowering import lower, lower_steps
from launch.preflight import DEFAULT_PYTHON, compile_programs
from launch.targets import parse_target
from trainer.config import ModelConfig, OptimizerConfig, PackingConfig
from trainer.errors import UserError

needs_compiler = pytest.mark.skipif(
    not DEFAULT_PYTHON.exists(), reason="the compiler for TPUs is missing; run `make preflight`"
)
# Two row groups, so that attention slices and joins; four chips, so that gradients are summed.
PACKING = PackingConfig(((4, 128), (2, 256)), max_documents=32, max_windows=48)
SCORING = PackingConfig(((8, 128),), max_documents=32, max_windows=48)
MODEL = ModelConfig(
    vocab_size=30522,
    num_labels=100,
    hidden_size=768,
    num_layers=2,
    num_attention_heads=12,
    intermediate_size=3072,
)
NUM_PARAMETERS = 38_680_420
NUM_VARIABLES = 33
CHIPS = 4


@pytest.fixture(scope="module")
def programs():
    return lower_steps(MODEL, OptimizerConfig(), PACKING, SCORING, replicas=CHIPS)


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "v5e:2x2",
        pytest.param("v5p:2x2x1", marks=pytest.mark.long),
        pytest.param("v6e:2x2", marks=pytest.mark.long),
    ],
)
def test_the_three_steps_compile_and_fit(programs, name):
    target = parse_target(name)
    assert target.chips == CHIPS
    compiled = compile_programs(programs, target, least_effort=True)
    for step, report in compiled.items():
        print(f"{name} {step}: {report}")
        assert report.memory < target.hbm_bytes
    weights = 4 * NUM_PARAMETERS
    train, evaluate, score = (compiled[step] for step in ("train", "evaluate", "score"))
    # Weights and two slots go in, and come out in the same memory; TPU layouts pad a little.
    assert 3 * weights < train.arguments < 3.01 * weights
    assert train.outputs < 100_000
    assert train.temporaries > weights  # Gradients, at least.
    assert weights < evaluate.arguments < 1.01 * weights
    assert weights < score.arguments < 1.01 * weights
    # A backward pass costs two forward passes.
    assert 2.9 < train.flops / evaluate.flops < 3.2


@needs_compiler
@pytest.mark.parametrize(
    ("head", "pooling", "num_labels", "accumulation", "ema_decay", "precision"),
    [
        ("label_attention", "max", 100, 2, 0.99, "mixed_bfloat16"),
        ("mean", "attention", 4000, 1, 0.0, "float32"),
    ],
)
def test_what_else_a_run_may_choose_compiles(
    head, pooling, num_labels, accumulation, ema_decay, precision
):
    model = dataclasses.replace(
        MODEL,
        vocab_size=1024,
        hidden_size=128,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        head=head,
        window_pooling=pooling,
        num_labels=num_labels,
    )
    packing = PackingConfig(((4, 128),), max_documents=16, max_windows=24)
    programs = lower_steps(
        model,
        OptimizerConfig(ema_decay=ema_decay),
        packing,
        packing,
        replicas=CHIPS,
        accumulation=accumulation,
        precision=precision,
    )
    compiled = compile_programs(programs, parse_target("v5e"), least_effort=True)
    # Weights and two slots, and the average of the weights where there is one.
    copies = compiled["train"].arguments / compiled["evaluate"].arguments
    assert copies == pytest.approx(4 if ema_decay else 3, rel=0.1)


def test_the_steps_sum_over_the_chips_of_a_slice(programs):
    # One for each gradient and one for loss and counts.
    assert programs["train"].count(b"all-reduce") == NUM_VARIABLES + 1
    assert programs["evaluate"].count(b"all-reduce") == 1  # Who requested a stop.
    assert programs["score"].count(b"all-reduce") == 0


def test_an_operation_that_no_accelerator_has_is_refused():
    with pytest.raises(ValueError, match="AsString"):
        lower(tf.strings.as_string, tf.TensorSpec([8]))


@needs_compiler
def test_an_operation_that_only_a_tpu_lacks_is_refused():
    program = lower(tf.signal.fft, tf.TensorSpec([8], tf.complex128))
    with pytest.raises(UserError, match="the spectrum step does not compile: .*FFT: c128"):
        compile_programs({"spectrum": program}, parse_target("v5e"))


@needs_compiler
def test_a_step_that_does_not_fit_is_refused_with_both_sizes():
    program = lower(lambda x: x + 1, tf.TensorSpec([8, 1 << 30]))
    with pytest.raises(UserError, match=r"64.00G.* exceeds .*15.75G.*fewer --tokens_per_replica"):
        compile_programs({"train": program}, parse_target("v5e:2x2"))


def test_no_compiler_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="run `make preflight`"):
        compile_programs({}, parse_target("v5e"), tmp_path / "python")


@pytest.mark.parametrize("text", ["", "v5e:", "v5e:4", "v5p:2x2", "v5e:0x2", "v7:2x2", "v5e:2x2 "])
def test_targets_that_are_none(text):
    with pytest.raises(UserError, match="--target=.* expected a TPU slice such as v5e:2x2"):
        parse_target(text)


def test_a_target_has_a_replica_on_every_chip():
    assert parse_target("v5p").chips == 4
    assert parse_target("v6e:4x8").chips == 32
