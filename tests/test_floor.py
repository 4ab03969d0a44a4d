"""The floor's arithmetic: whose time an operation's is, and that the parts add up."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("profile_parts")


@pytest.mark.parametrize(
    ("kind", "name", "shape", "expected"),
    [
        ("dot", "model_1/encoder_1/layer_2_1/attention_1/qkv_1/MatMul", (64, 96), "PRODUCTS"),
        (
            "dot",
            "gradient_tape/model/encoder/layer_0/output/MatMul/MatMul_1",
            (128, 32),
            "PRODUCTS",
        ),
        ("dot", "model/encoder/layer_2/attention/MatMul_1", (2, 4, 16, 16), "SCORES"),
        ("_MklBatchMatMulV2", "model/encoder/layer_0/attention/MatMul", (), "SCORES"),
        ("_MklNativeFusedMatMul", "model/encoder/layer_0/mul_2", (), "PRODUCTS"),
        ("exponential", "model/encoder/layer_2/attention/Softmax", (2, 4, 16, 16), "ATTENTION"),
        ("multiply", "AddN_3", (2, 4, 16, 16), "ATTENTION"),
        ("add", "AddN_7", (64, 96), "ATTENTION"),
        ("multiply", "AddN_21", (64, 128), "GELU"),
        ("Erf", "model/encoder/layer_0/Erf", (), "GELU"),
        ("divide", "model/encoder/layer_0/attention_layer_norm/Mean", (64, 1), "NORM"),
        ("add", "model/encoder/layer_0/add", (64, 32), "NORM"),
        ("select", "model/encoder/layer_0/SelectV2_1", (64, 32), "DROPOUT"),
        (
            "reduce",
            "gradient_tape/model/encoder/layer_0/inner/BiasAdd/BiasAddGrad",
            (32,),
            "BIASES",
        ),
        ("gather", "model/encoder/embeddings/GatherV2", (64, 32), "EMBEDDING"),
        ("scatter", "UnsortedSegmentSum", (300, 32), "EMBEDDING"),
        ("RealDiv", "truediv_12", (), "OPTIMIZER"),
        ("ResourceApplyAdam", "ResourceApplyAdam_3", (), "OPTIMIZER"),
        ("log", "loss/Log", (8, 5), "HEAD"),
    ],
)
def test_operations_belong_to_parts(parts, kind, name, shape, expected):
    operation = parts.Operation(kind, name, shape)
    assert parts.part_of(operation, parts.Widths(64, 32, 128)) == getattr(parts, expected)


def test_hashes_are_dropout(parts):
    operation = parts.Operation("xor", "model/encoder/layer_0/attention/BitwiseXor", (64,), True)
    assert parts.part_of(operation, parts.Widths(64, 32, 128)) == parts.DROPOUT


def test_a_fusion_is_shared_by_its_largest_operations(parts):
    norm = parts.Operation("subtract", "model/encoder/layer_0/output_layer_norm/sub", (64, 32))
    mask = parts.Operation("xor", "model/encoder/layer_0/BitwiseXor", (64, 32), True)
    row = parts.Operation("xor", "model/encoder/layer_0/BitwiseXor_1", (64,), True)
    constant = parts.Operation("constant", "", ())
    weights = parts._weigh([norm, mask, mask, mask, row, constant], parts.Widths(64, 32, 128))
    assert weights == {parts.NORM: 0.25, parts.DROPOUT: 0.75}


def test_simultaneous_operations_share_the_time(parts):
    second = 10**12
    a, b = ("", "a"), ("", "b")
    events = [(0, 4 * second, a), (2 * second, 6 * second, b), (8 * second, 11 * second, b)]
    shares = parts._share_time(events, second, 10 * second)
    # 1 to 2 a, 2 to 4 both, 4 to 6 b, 6 to 8 none, 8 to 10 b.
    assert shares == {a: pytest.approx(2.0), b: pytest.approx(5.0), None: pytest.approx(2.0)}


def test_an_inner_operation_has_its_own_time(parts):
    plane = parts.xplane_pb2.XPlane(name="/host:CPU")
    for number, name in enumerate(("outer:MatMul", "wait", "inner:Softmax"), start=1):
        plane.event_metadata[number].name = name
    line = plane.lines.add(timestamp_ns=1)
    for number, start, duration in ((1, 0, 100), (2, 10, 50), (3, 20, 30)):
        line.events.add(metadata_id=number, offset_ps=start, duration_ps=duration)
    found = [(start - 1000, end - 1000, key[1]) for start, end, key in parts._read_events(plane)]
    # Waiting is nobody's.
    assert found == [
        (0, 10, "outer:MatMul"),
        (20, 50, "inner:Softmax"),
        (60, 100, "outer:MatMul"),
    ]


@pytest.mark.long
def test_the_parts_add_up_to_the_step(tmp_path):
    flags = (
        "--rounds=1", "--steps=1", "--tokens=512", "--max_seq_length=64", "--hidden_size=64",
        "--num_layers=2", "--vocab_size=300", f"--output={tmp_path}",
    )  # fmt: skip
    process = subprocess.run(
        [sys.executable, str(BENCHMARKS / "floor.py"), *flags],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "floor.json").read_text())
    for mode in ("train", "score"):
        (milliseconds,) = result[mode]["milliseconds"]
        found = result[mode]["parts"]
        assert sum(found.values()) == pytest.approx(milliseconds)
        assert 0 < result[mode]["share"] < 1
        for name in ("products", "attention: products", "LayerNorm and residuals", "embeddings"):
            assert found[name] > 0, (mode, name, found)
    of_training = ("dropout", "GELU", "biases", "optimizer", "head, loss and the rest")
    assert all(result["train"]["parts"][name] > 0 for name in of_training)
    # Scoring has neither; TensorFlow's kernels fuse biases and GELU with the products.
    assert result["score"]["parts"]["dropout"] == result["score"]["parts"]["optimizer"] == 0
    rates = result["flops_per_second"]
    assert all(rates[dtype][mode] > 1e8 for dtype in rates for mode in ("train", "score"))
