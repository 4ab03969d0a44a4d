"""Times and bytes of a program's text, on texts small enough to add up by hand."""

import dataclasses

import pytest

from launch.accelerators import Rates, parse_target
from launch.preflight.hlo import parse_module, parse_shapes
from launch.preflight.job_shape import QUANTUM, find_largest
from launch.preflight.roofline import (
    Cost,
    StepCost,
    describe,
    estimate,
    extend,
    has_loops,
    missing_seconds,
    total,
)
from launch.preflight.traffic import hbm_bytes, link_bytes, matmul_flops

# Of round numbers: a byte of HBM takes a nanosecond, a thousand FLOP too.
RATES = Rates(flops=1e12, hbm=1e9, links=1e8, replicas=4, clock=1e9)

# bf16 [256, 128] is 64 KiB, [128, 512] 128 KiB, [256, 512] 256 KiB; all tiles are full.
PROGRAM = """HloModule step, is_scheduled=true, entry_computation_layout={(bf16[256,128])->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%product (a: bf16[256,128], b: bf16[128,512]) -> bf16[256,512] {
  %a = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[256,512]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[256,512])) -> (s32[], bf16[256,512]) {
  %state = (s32[]{:T(128)S(6)}, bf16[256,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %value = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %next = bf16[256,512]{1,0:T(8,128)(2,1)} negate(%value)
  ROOT %out = (s32[]{:T(128)S(6)}, bf16[256,512]{1,0:T(8,128)(2,1)}) tuple(%i, %next)
}

%condition (state: (s32[], bf16[256,512])) -> pred[] {
  %state = (s32[]{:T(128)S(6)}, bf16[256,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i, %bound), direction=LT
}

ENTRY %main (left: bf16[256,128], right: bf16[128,512]) -> (s32[], bf16[256,512]) {
  %left = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %right = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[128,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%right)
  %done = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %fusion = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%left, %done), kind=kOutput, calls=%product, metadata={op_name="StatefulPartitionedCall/model_1/encoder_1/layer_11_1/output_1/MatMul"}, backend_config={"estimated_cycles":"900000"}
  %joined = bf16[256,512]{1,0:T(8,128)(2,1)} custom-call(%fusion), custom_call_target="ConcatBitcast"
  %pair = (s32[]{:T(128)S(6)}, bf16[256,512]{1,0:T(8,128)(2,1)}) tuple(%zero, %joined)
  %all-reduce = f32[1000]{0:T(1024)} all-reduce(%left), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="XlaAllReduce_3"}
  ROOT %loop = (s32[]{:T(128)S(6)}, bf16[256,512]{1,0:T(8,128)(2,1)}) while(%pair), condition=%condition, body=%body
}
"""  # noqa: E501

# Where TensorFlow puts what a step's first function does.
CALL = "StatefulPartitionedCall"
KIB = 1024
RIGHT, FUSION, NEGATE = 128 * KIB, (64 + 256) * KIB, 2 * 256 * KIB
# 4 bytes for each of 1,024 padded numbers, three quarters of them twice over links.
SUM_SECONDS = 2 * 0.75 * 4096 / 1e8
FLOPS = 2 * 256 * 128 * 512


def entry(text: str):
    module = parse_module(text)
    return module, module.computations[module.entry]


def one_fusion(inner: str, operands: str, result: str, called: str = "") -> tuple:
    """The cost of a fusion of a computation with these lines."""
    names = ", ".join(f"%in{i}" for i in range(len(operands.split(";"))))
    parameters = "\n".join(
        f"  %in{i} = {shape.strip()} parameter({i})" for i, shape in enumerate(operands.split(";"))
    )
    text = (
        f"HloModule m\n\n{called}%inner (x: f32[]) -> f32[] {{\n{inner}\n}}\n\n"
        f"ENTRY %main (x: f32[]) -> f32[] {{\n{parameters}\n"
        f"  ROOT %f = {result} fusion({names}), kind=kLoop, calls=%inner\n}}\n"
    )
    module, computation = entry(text)
    fusion = computation.instructions["f"]
    return hbm_bytes(module, fusion, computation), matmul_flops(module, fusion, computation)


def test_arrays_take_whole_tiles():
    for text, size in (
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("f32[5,130]{1,0:T(8,128)}", 8 * 256 * 4),
        ("f32[5,130]{0,1:T(8,128)}", 128 * 136 * 4),  # Columns are the rows there.
        ("bf16[3,5,130]{2,1,0:T(8,128)(2,1)}", 3 * 8 * 256 * 2),
        ("f32[768]{0:T(1024)S(1)}", 1024 * 4),
        ("pred[10]", 10),
        ("s4[16]{0}", 8),
        ("f8e4m3fn[16]{0}", 16),
        ("s64[]", 8),
        ("token[]", 0),
    ):
        (shape,) = parse_shapes(text)
        assert shape.bytes == size, text
    shapes = parse_shapes("(f32[8,128]{1,0:T(8,128)S(1)}, /*index=1*/(u32[2]{0}, s32[]{:S(6)}))")
    assert [shape.in_hbm for shape in shapes] == [False, True, False]
    assert [shape.sizes for shape in shapes] == [(8, 128), (2,), ()]


def test_a_program_takes_the_sum_of_its_operations():
    costs = estimate(parse_module(PROGRAM), RATES)
    # Nothing ran beside the copy, so the product waits for all of it.
    assert costs["copy-done without a name"].seconds == pytest.approx(RIGHT / 1e9)
    product = costs["encoder/layer/output/MatMul"]
    assert product.flops == FLOPS
    # The right side is on the chip; 320 KiB at 1 GB/s take longer than 33.6 MFLOP at 1 TFLOP/s.
    assert product.hbm == FUSION and product.seconds == pytest.approx(FUSION / 1e9)
    assert costs["negate without a name"].hbm == 5 * NEGATE
    assert costs["negate without a name"].count == 5
    assert costs["sum over replicas"].seconds == pytest.approx(SUM_SECONDS)
    whole = total(costs)
    assert whole.hbm == RIGHT + FUSION + 5 * NEGATE
    assert whole.link_seconds == pytest.approx(SUM_SECONDS)
    assert whole.seconds == pytest.approx((RIGHT + FUSION + 5 * NEGATE) / 1e9 + SUM_SECONDS)
    assert whole.flops_seconds == pytest.approx(FLOPS / 1e12)


def test_products_that_take_longer_than_their_bytes_take_their_own_time():
    slow = Rates(flops=1e10, hbm=1e9, links=1e8, replicas=4, clock=1e9)
    costs = estimate(parse_module(PROGRAM), slow)
    assert costs["encoder/layer/output/MatMul"].seconds == pytest.approx(FLOPS / 1e10)


def test_estimated_cycles_count_where_they_are_more():
    costs = estimate(parse_module(PROGRAM), RATES, by_cycles=True)
    assert costs["encoder/layer/output/MatMul"].seconds == pytest.approx(900e-6)
    fast = Rates(flops=1e12, hbm=1e9, links=1e8, replicas=4, clock=1e10)
    costs = estimate(parse_module(PROGRAM), fast, by_cycles=True)
    assert costs["encoder/layer/output/MatMul"].seconds == pytest.approx(FUSION / 1e9)


def test_a_copy_moves_beside_what_leaves_bandwidth():
    """The product leaves 1 GB/s for as long as it computes more than it moves."""
    lines = PROGRAM.splitlines()
    (start,) = (i for i, line in enumerate(lines) if "copy-done(" in line)
    done, fusion = lines[start], lines[start + 1]
    lines[start : start + 2] = [fusion.replace("%done", "%right"), done]
    # In HBM the right side counts inside of the product too.
    product_bytes = FUSION + RIGHT
    slow = Rates(flops=FLOPS / 500e-6, hbm=1e9, links=1e8, replicas=4, clock=1e9)
    costs = estimate(parse_module("\n".join(lines)), slow)
    assert costs["encoder/layer/output/MatMul"].seconds == pytest.approx(500e-6)
    left = RIGHT - (500_000 - product_bytes)
    assert costs["copy-done without a name"].seconds == pytest.approx(left / 1e9)


def test_a_slice_that_is_copied_asynchronously_moves_its_own_bytes():
    """Of 1 MiB in HBM 4 KiB go to the chip; the whole array is among the results of the start."""
    whole, part = "f32[2048,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
    text = (
        f"HloModule m\n\n%moving (a: f32[], i: s32[]) -> f32[] {{\n  %a = {whole} parameter(0)\n"
        "  %i = s32[]{:S(6)} parameter(1)\n"
        f"  ROOT %s = {part} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={{8,128}}\n}}\n\n"
        f"ENTRY %main (a: f32[], i: s32[]) -> f32[] {{\n  %a = {whole} parameter(0)\n"
        "  %i = s32[]{:S(6)} parameter(1)\n"
        f"  %start = (({whole}, s32[]{{:S(6)}}), {part}, s32[]{{:S(2)}}) async-start(%a, %i), "
        f"calls=%moving\n  %later = (({whole}, s32[]{{:S(6)}}), {part}, s32[]{{:S(2)}}) "
        f"async-update(%start)\n  ROOT %done = {part} async-done(%later)\n}}\n"
    )
    whole_cost = total(estimate(parse_module(text), RATES))
    assert whole_cost.hbm == 4096
    assert whole_cost.seconds == pytest.approx(4096 / 1e9)


def test_the_compiler_may_note_how_often_a_loop_runs():
    noted = PROGRAM.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert estimate(parse_module(noted), RATES)["negate without a name"].count == 7


def test_optimal_seconds_lack_one_for_each_custom_call_but_allocations():
    assert missing_seconds(parse_module(PROGRAM)) == 1
    allocated = PROGRAM.replace('"ConcatBitcast"', '"AllocateBuffer"')
    assert missing_seconds(parse_module(allocated)) == 0
    assert total(estimate(parse_module(allocated), RATES)).hbm == RIGHT + FUSION + 5 * NEGATE


def test_loops_that_run_more_than_once_are_known():
    assert has_loops(parse_module(PROGRAM))
    assert not has_loops(parse_module(PROGRAM.replace("constant(5)", "constant(1)")))


def test_batched_products_are_windows_that_meet_each_batch_once():
    """Both forms are of a TPU's program: 16 x 12 products of [512, 64] and [64, 512]."""
    side = "bf16[16,12,512,64]{3,2,1,0:T(8,128)(2,1)}"
    scores = "bf16[16,12,512,512]{2,3,1,0:T(8,128)(2,1)}"
    for window in (
        "size=16x12 stride=15x11 lhs_dilate=16x12",
        "size=16x12 stride=16x12 pad=15_15x11_11 lhs_dilate=15x11 rhs_reversal=1x1",
    ):
        _, flops = one_fusion(
            f"  %a = {side} parameter(0)\n  %b = {side} parameter(1)\n"
            f"  ROOT %c = {scores} convolution(%a, %b), window={{{window}}}, "
            "dim_labels=01bf_01oi->01bf",
            f"{side}; {side}",
            scores,
        )
        assert flops == 16 * 12 * 2 * 512 * 512 * 64


def test_an_image_s_convolution_counts_no_padding():
    """3 x 3 over 4 x 4, padded by one: 4 corners meet 4 taps, 8 edges 6, 4 inner places 9."""
    _, flops = one_fusion(
        "  %a = f32[2,4,4,3]{3,2,1,0} parameter(0)\n  %b = f32[3,3,3,5]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = f32[2,4,4,5]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
        "dim_labels=b01f_01io->b01f",
        "f32[2,4,4,3]{3,2,1,0}; f32[3,3,3,5]{3,2,1,0}",
        "f32[2,4,4,5]{3,2,1,0}",
    )
    assert flops == 2 * 2 * 3 * 5 * (4 * 4 + 8 * 6 + 4 * 9)


def test_a_dot_counts_what_it_contracts():
    _, flops = one_fusion(
        "  %a = f32[7,6,5]{2,1,0} parameter(0)\n  %b = f32[7,5,4]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[7,6,4]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
        "f32[7,6,5]{2,1,0}; f32[7,5,4]{2,1,0}",
        "f32[7,6,4]{2,1,0}",
    )
    assert flops == 2 * 7 * 6 * 4 * 5


def test_of_slices_and_updates_in_place_only_the_part_moves():
    whole, part = "f32[1024,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)}"
    moved, _ = one_fusion(
        f"  %a = {whole} parameter(0)\n  %b = {part} parameter(1)\n  %i = s32[] constant(0)\n"
        f"  %s = {part} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={{8,128}}\n"
        f"  %n = {part} add(%s, %b)\n"
        f"  ROOT %u = {whole} dynamic-update-slice(%a, %n, %i, %i)",
        f"{whole}; {part}",
        whole,
    )
    assert moved == 3 * 4096  # The slice, what is added to it, and the update.


def test_a_fusion_within_a_fusion_reads_rows_only():
    table, rows = "f32[30522,128]{1,0:T(8,128)}", "f32[16,128]{1,0:T(8,128)}"
    called = (
        f"%gathering (t: f32[], j: f32[]) -> f32[] {{\n  %t = {table} parameter(0)\n"
        "  %j = s32[16]{0:T(128)S(1)} parameter(1)\n"
        f"  ROOT %g = {rows} gather(%t, %j), offset_dims={{1}}, slice_sizes={{1,128}}\n}}\n\n"
    )
    moved, _ = one_fusion(
        f"  %a = {table} parameter(0)\n  %j = s32[16]{{0:T(128)S(1)}} parameter(1)\n"
        f"  ROOT %f = {rows} fusion(%a, %j), kind=kLoop, calls=%gathering",
        f"{table}; s32[16]{{0:T(128)S(1)}}",
        rows,
        called,
    )
    assert moved == 2 * 16 * 128 * 4


def test_collective_operations_are_the_links():
    _, computation = entry(PROGRAM)
    assert link_bytes(computation.instructions["all-reduce"]) == 4096
    assert link_bytes(computation.instructions["fusion"]) == 0


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (
            f"{CALL}/model_1/encoder_1/layer_3_1/attention_1/Softmax_2",
            "encoder/layer/attention/Softmax",
        ),
        (f"{CALL}/gradient_tape/model_1/head_1/pooler_1/MatMul_1", "head/pooler/MatMul/(backward)"),
        (f"{CALL}/while/model_1/head_1/MatMul", "head/MatMul"),
        (f"{CALL}/Sum_8", "Sum/(backward, dropout and LayerNorm)"),
        (f"{CALL}_1/ResourceApplyAdam_9", "update of the weights"),
        ("", "negate without a name"),
    ],
)
def test_operations_of_all_layers_have_one_name(name, label):
    metadata = f', metadata={{op_name="{name}"}}' if name else ""
    text = (
        "HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
        f"  ROOT %n = f32[8]{{0}} negate(%x){metadata}\n}}\n"
    )
    _, computation = entry(text)
    assert describe(computation.instructions["n"]) == label


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse_module("HloModule m\n")


def test_a_deeper_step_continues_a_straight_line():
    def step(factor: float, names: tuple[str, ...]) -> StepCost:
        costs = {name: Cost(seconds=factor, flops=10 * factor, count=1) for name in names}
        memory = {"arguments": 5 + factor, "temporaries": 10 * factor}
        return StepCost(memory, 7 * factor, 9 * factor, 4.0 + factor, costs)

    shallow, deep = step(1.0, ("a",)), step(2.0, ("a", "b"))
    twelve = extend(shallow, deep, 10)
    assert twelve.memory == {"arguments": 17, "temporaries": 120}
    assert twelve.total_memory == 137
    assert (twelve.xla_flops, twelve.xla_seconds, twelve.cycle_seconds) == (84, 108, 16)
    assert twelve.costs["a"].seconds == 12 and twelve.costs["a"].flops == 120
    assert twelve.costs["b"].seconds == 22  # None in the shallow program, two in the deep one.
    assert twelve.roofline.seconds == 34
    assert twelve.seconds == (16, 108)
    assert extend(shallow, deep, 0) == deep
    with_loops = dataclasses.replace(deep, xla_flops=None, xla_seconds=None)
    assert extend(with_loops, with_loops, 10).seconds == (4, 6)


@pytest.mark.parametrize("start", [512, 4096, 40_000, 500_000])
def test_the_search_for_a_batch_ends_below_the_limit(start):
    looked_at = []

    def memory_of(tokens: int) -> float:
        looked_at.append(tokens)
        return 1e9 + 3e5 * tokens + 1e5 * (tokens % 1024 > 0)

    found = find_largest(memory_of, 16e9, start, 0.9e9, QUANTUM)
    assert found.tokens == 50_000 // QUANTUM * QUANTUM == 49_664
    assert found.memory == memory_of(found.tokens) <= 16e9
    assert found.trials <= 4 and len(set(looked_at)) == found.trials


def test_the_search_goes_on_where_the_compiler_gives_up():
    found = find_largest(
        lambda tokens: 1e9 + 3e5 * tokens if tokens < 60_000 else float("inf"),
        16e9, 150_000, 1e9, QUANTUM,
    )  # fmt: skip
    assert found.tokens == 49_664
    assert found.refused is not None and found.refused[0] > 49_664


def test_nothing_fits_where_the_least_does_not():
    found = find_largest(lambda tokens: 20e9, 16e9, 4096, 1e9, 1024)
    assert (found.tokens, found.refused) == (0, (1024, 20e9))


@pytest.mark.parametrize(
    ("name", "links"),
    [("v5e:2x2", 2), ("v5e:4x4", 2), ("v5e:1x4", 1), ("v5e:16x16", 4), ("v5p:2x2x1", 2),
     ("v5p:4x4x4", 6), ("v5p:4x4x2", 3)],
)  # fmt: skip
def test_a_sum_uses_the_links_that_a_slice_has(name, links):
    target = parse_target(name)
    assert target.rates.links == links * target.kind.ici_link_bandwidth
    assert target.rates.replicas == target.chips
