"""The engine and precision of scoring, by what a processor has; every processor here is made up."""

import pytest

from trainer.errors import UserError
from trainer.runtime import processor
from trainer.runtime.processor import Processor, ScoringChoice, choose_on_cpu, read_processor

AVX2 = Processor(frozenset({"avx2", "fma"}))
AVX512 = Processor(AVX2.flags | {"avx512f"})
VNNI = Processor(AVX512.flags | {"avx512_vnni"})
CLIENT_VNNI = Processor(AVX2.flags | {"avx_vnni"})
BF16 = Processor(VNNI.flags | {"avx512_bf16"})
AMX = Processor(BF16.flags | {"amx_bf16", "amx_int8", "amx_tile"})


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (AVX2, "avx2"), (AVX512, "avx512"), (VNNI, "avx512_vnni"), (CLIENT_VNNI, "avx_vnni"),
        (BF16, "avx512_bf16"), (AMX, "amx"), (Processor(), "riscv"),
    ],
)  # fmt: skip
def test_a_class_is_named_by_the_widest_instructions(monkeypatch, found, kind):
    monkeypatch.setattr("platform.machine", lambda: "riscv")
    assert found.kind == kind


@pytest.mark.parametrize(
    ("found", "is_installed", "choice"),
    [
        (AMX, True, "bfloat16 by openvino"),
        (AMX, False, "bfloat16 by tensorflow"),
        *((other, True, "float32 by tensorflow") for other in (AVX2, VNNI, BF16, Processor())),
    ],
)
def test_auto_is_bfloat16_with_amx_alone(found, is_installed, choice):
    assert str(choose_on_cpu("auto", "auto", found, is_installed)) == choice
    # float32 can be asked for everywhere, from either engine.
    assert str(choose_on_cpu("auto", "float32", found, True)) == "float32 by tensorflow"
    assert str(choose_on_cpu("openvino", "float32", found, True)) == "float32 by openvino"


@pytest.mark.parametrize("found", [VNNI, CLIENT_VNNI, BF16, AMX])
def test_int8_runs_by_openvino_where_the_processor_has_vnni(found):
    assert choose_on_cpu("auto", "int8", found, True) == ScoringChoice("openvino", "int8")


@pytest.mark.parametrize(
    ("flags", "found", "is_installed", "said"),
    [
        (("auto", "int8"), AVX512, True, "--precision=int8: this processor has no VNNI, without"),
        (("auto", "int8"), AMX, False, "--precision=int8: OpenVINO is not installed; pip install"),
        (("tensorflow", "int8"), AMX, True, "--engine=tensorflow: it does not run int8; leave"),
        (("auto", "bfloat16"), BF16, True, "--precision=bfloat16: this processor has no AMX"),
        (("openvino", "auto"), VNNI, False, "--engine=openvino: OpenVINO is not installed"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(flags, found, is_installed, said):
    with pytest.raises(UserError) as caught:
        choose_on_cpu(*flags, found, is_installed)
    assert str(caught.value).startswith(said)


def test_force_goes_on_where_the_processor_is_slow_or_not_exact():
    assert choose_on_cpu("auto", "int8", AVX2, True, force=True).precision == "int8"
    assert str(choose_on_cpu("auto", "bfloat16", AVX2, False, force=True)) == (
        "bfloat16 by tensorflow"
    )


def test_flags_are_those_of_the_first_processor(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name: X amx\nflags\t\t: fpu avx2 fma\n\nflags : amx\n")
    assert read_processor(str(path)) == Processor(frozenset({"fpu", "avx2", "fma"}))
    path.write_text("processor : 0\nFeatures : neon\n")
    read_processor.cache_clear()
    assert read_processor(str(path)).flags == frozenset()
    assert read_processor(str(tmp_path / "none")) == Processor()


def test_openvino_counts_as_installed_with_onnx_alone(monkeypatch):
    missing = {"openvino"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in missing else object()
    )
    assert not processor.has_openvino()
    missing.clear()
    assert processor.has_openvino()
    missing.add("onnx")
    assert not processor.has_openvino()
