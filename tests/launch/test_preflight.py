"""What a TPU runs compiles for one, without one: BERT-base's width, two layers, small batches."""

import contextlib
import dataclasses
import io
import json
import math
import re

import pytest
import tensorflow as tf

from launch.accelerators import parse_target
from launch.preflight.command import find_batch, report_step, split_memory
from launch.preflight.compilation import DEFAULT_PYTHON, compile_programs
from launch.preflight.job_shape import (
    JobShape,
    Preflight,
    assume_lengths,
    model_flops,
)
from launch.preflight.lowering import lower, lower_steps
from launch.preflight.roofline import StepCost
from launch.preflight_config import PreflightConfig
from trainer import cli
from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing
from trainer.errors import DoesNotFit, UserError
from trainer.flags import parse_flags
from trainer.model.model import build_model
from trainer.model_config import (
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    num_parameters,
    num_wide_parameters,
)
from trainer.run_config import TrainConfig

needs_compiler = pytest.mark.skipif(
    not DEFAULT_PYTHON.exists(), reason="the compiler for TPUs is missing; run `make compiler`"
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
# A job whose programs compile in seconds.
SMALL = [
    "--vocab_size=1024", "--hidden_size=128", "--num_attention_heads=2", "--intermediate_size=256",
    "--max_seq_length=128", "--row_groups=8x128", "--tokens_per_batch=1024", "--least_effort",
]  # fmt: skip


def lowered(model, packing, scoring_packing, precision="mixed_bfloat16", **changes):
    shape = JobShape(model, packing, scoring_packing, 32, tokens_per_document=1, num_documents=1)
    config = TrainConfig(data_dir="none", model_dir="none", precision=precision, **changes)
    return lower_steps(config, shape, CHIPS)


@pytest.fixture(scope="module")
def programs():
    return lowered(MODEL, PACKING, SCORING)


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
        MODEL, vocab_size=1024, hidden_size=128, num_layers=1, num_attention_heads=2,
        intermediate_size=256, head=head, window_pooling=pooling, num_labels=num_labels,
    )  # fmt: skip
    packing = PackingConfig(((4, 128),), max_documents=16, max_windows=24)
    programs = lowered(
        model, packing, packing, precision,
        gradient_accumulation=accumulation, optimizer=OptimizerConfig(ema_decay=ema_decay),
    )  # fmt: skip
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
    with pytest.raises(DoesNotFit) as raised:
        compile_programs({"train": program}, parse_target("v5e:2x2"))
    assert str(raised.value) == (
        "v5e:2x2: the train step does not fit: it needs 64.00 GiB a chip, 48.25 GiB more than the "
        "15.75 GiB that a program can have; take fewer --tokens_per_replica"
    )


def test_no_compiler_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="run `make compiler`"):
        compile_programs({}, parse_target("v5e"), python=tmp_path / "python")


@pytest.mark.parametrize("text", ["", "v5e:", "v5e:4", "v5p:2x2", "v5e:0x2", "v7:2x2", "v5e:2x2 "])
def test_targets_that_are_none(text):
    with pytest.raises(UserError, match="--target=.* expected a TPU slice such as v5e:2x2"):
        parse_target(text)


def test_a_target_has_a_replica_on_every_chip():
    assert parse_target("v5p").chips == 4
    assert parse_target("v6e:4x8").chips == 32


def test_parameters_are_counted_as_the_model_has_them():
    assert num_parameters(MODEL) == NUM_PARAMETERS
    for head, pooling in (("mean", "attention"), ("label_attention", "max"), ("cls", "attention")):
        small = dataclasses.replace(
            MODEL, vocab_size=64, hidden_size=8, num_attention_heads=2, intermediate_size=12,
            num_labels=5, max_position_embeddings=16, head=head, window_pooling=pooling,
        )  # fmt: skip
        variables = build_model(small).named_variables().values()
        assert num_parameters(small) == sum(math.prod(variable.shape) for variable in variables)


@pytest.mark.parametrize("limit", [2**26, 1])
def test_parameters_of_the_wide_part_are_counted_with_one_table_and_with_two(limit, monkeypatch):
    monkeypatch.setattr("trainer.model_config.MAX_WIDE_PARAMETERS", limit)
    small = dataclasses.replace(
        MODEL, vocab_size=64, hidden_size=8, num_attention_heads=2, intermediate_size=12,
        num_labels=5, max_position_embeddings=16, wide="wordpieces",
    )  # fmt: skip
    model = build_model(small)
    sizes = {name: math.prod(value.shape) for name, value in model.named_variables().items()}
    of_wide = sum(size for name, size in sizes.items() if name.startswith("wide/"))
    assert num_wide_parameters(small) == of_wide > 64 * 5
    assert num_parameters(small) == sum(sizes.values())
    assert num_wide_parameters(dataclasses.replace(small, wide="none")) == 0


def test_useful_work_is_six_flop_a_parameter_and_token_and_the_attention():
    # 12 layers of BERT-base: 85.05 M weights in products; 12 x 4 x 768 a token and key.
    base = dataclasses.replace(MODEL, num_layers=12, head="mean")
    packing = PackingConfig(((4, 512),), 4, 4)
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    attention = 12 * 4 * 768 * 512 * 2048
    head = 2 * 4 * 768 * 100
    assert model_flops(base, packing) == 2 * weights * 2048 + attention + head
    # The last layer's 5.3 M weights after its attention and the pooler see 4 [CLS] alone.
    last = 768 * 768 + 2 * 768 * 3072
    weights, head = weights - last, head + 2 * 4 * 768 * 768
    of_cls = 2 * weights * 2048 + 2 * last * 4 + attention + head
    assert model_flops(dataclasses.replace(base, head="cls"), packing) == of_cls


def test_assumed_lengths_have_the_mean_that_was_asked_for():
    for mean, longest in ((128, 512), (31.5, 128), (300, 4096)):
        lengths = assume_lengths(mean, longest)
        assert len(lengths) == longest + 1 and lengths[longest] > 0
        tokens = sum(length * count for length, count in enumerate(lengths))
        assert 0.95 * mean < tokens / sum(lengths) <= mean


def small_config(**changes) -> PreflightConfig:
    config = parse_flags(PreflightConfig, ["--target=v5e", *SMALL])
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[dict, str]:
    """What the command writes and prints of two steps of four layers."""
    output = tmp_path_factory.mktemp("preflight") / "figures.json"
    arguments = [*SMALL, "--num_layers=4", "--price_per_chip_hour=2", f"--output={output}"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        cli.main(["preflight", "--target=v5e:4x4", *arguments])
    return json.loads(output.read_text()), shown.getvalue()


@needs_compiler
@pytest.mark.parametrize("name", ["train", "score"])
def test_the_command_reports_memory_by_kind_and_time_as_a_range(reported, name):
    figures, shown = reported
    step = figures["steps"][name]
    assert step["compiled_layers"] == [2, 3]
    shape = Preflight.of(small_config(num_layers=4)).shape
    parts = split_memory(shape, name, StepCost(**step["cost"]), has_average=False)
    assert sum(parts.values()) == pytest.approx(step["total_memory"], rel=1e-9)
    assert parts["weights"] == 4 * num_parameters(shape.model)
    assert all(size >= 0 for size in parts.values())
    # An estimate is a range, and what follows from it too.
    shortest, longest = step["seconds"]
    assert 0 < shortest < longest < 1
    least, most = step["documents_per_second_per_chip"]
    assert least * longest == pytest.approx(most * shortest)
    hours = [1_000_000 * step["passes"] / rate / 3600 for rate in (most, least)]
    assert step["chip_hours"] == pytest.approx(hours)
    (line,) = (line for line in shown.splitlines() if line.startswith(f"{name} step"))
    assert "with 2 and 3 layers and extended in a straight line to 4" in line
    assert "of 15.75 in all: fits" in shown and "how far to trust it" in shown


@needs_compiler
def test_a_slice_sums_the_gradients_of_all_its_chips(reported):
    """15/16 of 4 bytes a parameter, twice, at 100 GB/s; little tensors are padded."""
    figures, _ = reported
    costs = figures["steps"]["train"]["cost"]["costs"]
    shape = Preflight.of(small_config(num_layers=4)).shape
    trained = num_parameters(shape.model) - num_wide_parameters(shape.model)
    least = 2 * 15 / 16 * 4 * trained / 100e9
    assert least < costs["sum over replicas"]["link_seconds"] < 1.2 * least


@needs_compiler
def test_depth_extends_what_shallow_programs_need(reported):
    figures, _ = reported
    config = small_config(num_layers=4, full_depth=True, target="v5e:4x4")
    whole = report_step(Preflight.of(config), "train")
    assert whole.compiled_layers == (4,)
    extended = figures["steps"]["train"]
    assert extended["total_memory"] == pytest.approx(whole.cost.total_memory, rel=0.05)
    assert extended["seconds"][0] == pytest.approx(whole.cost.roofline.seconds, rel=0.1)
    assert extended["model_flops"] == whole.model_flops


@needs_compiler
@pytest.mark.long
def test_the_largest_batch_is_found():
    """On a chip with little memory, so that the programs stay small."""
    config = small_config(num_layers=1, row_groups=None, tokens_per_replica=1024)
    kind = dataclasses.replace(parse_target("v5e").kind, hbm_bytes=24 << 20)
    target = dataclasses.replace(parse_target("v5e"), kind=kind)
    largest = find_batch(dataclasses.replace(Preflight.of(config), target=target), {})
    assert 0.8 * target.hbm_bytes < largest.memory <= target.hbm_bytes
    assert largest.tokens > 1024 and largest.trials <= 5


@needs_compiler
def test_an_over_large_batch_exits_3_and_says_by_how_much(capsys):
    """2 heads x 8,192 rows of 512 x 512 scores: 16 GiB in float32."""
    arguments = ["--num_layers=1", "--steps=train", "--row_groups=8192x512", "--max_seq_length=512"]
    with pytest.raises(SystemExit) as exit:
        cli.main(["preflight", "--target=v5e:2x2", *SMALL, *arguments])
    assert exit.value.code == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    pattern = (
        r"multihot preflight: error: v5e:2x2: the train step does not fit: it needs ([\d.]+) GiB a "
        r"chip, ([\d.]+) GiB more than the 15.75 GiB that a program can have; take fewer "
        r"--tokens_per_replica"
    )
    needed, too_many = map(float, re.fullmatch(pattern, error.strip()).groups())
    assert needed - too_many == pytest.approx(15.75, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--target is required"),
        (["--target=v9:2x2"], "--target=v9:2x2: expected a TPU slice such as v5e:2x2"),
        (["--target=v5e", "--data_dir=d", "--num_labels=3"], "--num_labels=3: --data_dir says"),
        (["--target=v5e", "--steps=tarin"], "--steps=tarin: expected train, score, or train,score"),
        (["--target=v5e", "--find_batch", "--row_groups=8x64"], "--find_batch chooses the rows"),
        (["--target=v5e", "--find_batch", "--steps=score"], "--find_batch: looks at the train"),
        (["--target=v5e", "--hidden_size=7"], "--hidden_size=7: expected a multiple of"),
        (["--target=v5e", "--price_per_chip_hour=-1"], "--price_per_chip_hour=-1.0: expected 0 or"),
        (["--target=v5e", "--compiler=/no/python"], "/no/python: no compiler for TPUs; run `make"),
        (["--target=v5e", "--row_groups=8x64"], "the longest row has 64 tokens"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["preflight", *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error


def test_the_data_folder_says_what_is_learned(corpus):
    config = parse_flags(PreflightConfig, ["--target=v5e", f"--data_dir={corpus}"])
    metadata = load_metadata(str(corpus))
    shape = Preflight.of(config).shape
    split = metadata.split("train")
    assert shape.model.num_labels == len(metadata.labels)
    assert shape.model.vocab_size == metadata.vocab_size
    assert shape.num_documents == split.documents
    assert shape.tokens_per_document == split.tokens / split.documents
    assert shape.packing == choose_packing(
        split.length_histogram, 4096, None, metadata.max_seq_length, split.window_histogram, 1
    )
