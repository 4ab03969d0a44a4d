"""The table of accelerators: whole, consistent, and found by the names that people use."""

import math

import pytest

from launch.accelerators import (
    default_topology,
    find_slice,
    find_vertex_machine,
    parse_topology,
    tpu_kinds,
    tpu_slices,
    vertex_machines,
)
from trainer.errors import UserError

GIB = 1 << 30


def test_chips_are_those_of_the_topology_and_hosts_have_one_four_or_eight():
    slices = tpu_slices()
    assert len(slices) == 32 and len({item.name for item in slices}) == 32
    for item in slices:
        sizes = [int(size) for size in item.topology.split("x")]
        assert item.chips == math.prod(sizes) and len(sizes) == item.kind.dimensions, item
        assert item.chips % item.hosts == 0 and item.chips // item.hosts in (1, 4, 8), item
        # Cloud TPU counts chips in the names of v5e and v6e, and cores, two a chip, in the others.
        a_chip = 1 if item.kind.name in ("v5e", "v6e") else 2
        assert item.name.endswith(f"-{a_chip * item.chips}"), item
        assert ("-pod-" in item.runtime_image) == (item.hosts > 1), item


@pytest.mark.parametrize(
    ("name", "hbm", "flops", "bandwidth", "links", "link"),
    [
        ("v5e", 15.75, 197e12, 819e9, 4, 50e9),
        ("v5p", 95.73, 459e12, 2765e9, 6, 100e9),
        ("v6e", 31.24, 918e12, 1638e9, 4, 100e9),
    ],
)
def test_figures_of_a_chip(name, hbm, flops, bandwidth, links, link):
    kind = tpu_kinds()[name]
    assert kind.hbm_bytes == int(hbm * GIB)
    assert (kind.bf16_flops, kind.hbm_bandwidth) == (flops, bandwidth)
    assert (kind.ici_links, kind.ici_link_bandwidth) == (links, link)


def test_memory_that_no_compiler_told_is_not_made_up():
    assert tpu_kinds()["v4"].hbm_bytes is None


@pytest.mark.parametrize(
    ("text", "name", "hosts"),
    [
        ("v5e", "v5litepod-4", 1),
        ("v5litepod-8", "v5litepod-8", 1),
        ("v5e:4x4", "v5litepod-16", 4),
        ("v5p:2x2x1", "v5p-8", 1),
        ("v4-32", "v4-32", 4),
        ("v6e:2x4", "v6e-8", 1),
    ],
)
def test_slices_are_found_by_type_topology_and_kind(text, name, hosts):
    found = find_slice(text)
    assert (found.name, found.hosts) == (name, hosts)


def test_an_unknown_slice_is_answered_with_those_of_its_kind():
    with pytest.raises(UserError, match=r"--accelerator=v5e-16: .* v5litepod-16 \(v5e:4x4\)"):
        find_slice("v5e-16")
    with pytest.raises(UserError, match=r"--accelerator=v5litepod-3: .* v5litepod-4 \(v5e:2x2\)"):
        find_slice("v5litepod-3")
    with pytest.raises(UserError, match=r"--accelerator=h100: .* of v4, v5e, v5p, v6e"):
        find_slice("h100")


def test_what_is_not_proven_warns():
    assert {item.name for item in tpu_slices() if item.warning is None} == {
        item.name for item in tpu_slices() if item.hosts == 1 and item.kind.name != "v6e"
    }
    warned = {item.name.partition(":")[0] for item in vertex_machines() if item.warning}
    assert warned == {"v100", "v5e"}


def test_topologies_need_not_be_on_offer():
    assert parse_topology("v5e:3x5") == (tpu_kinds()["v5e"], "3x5")
    assert [parse_topology(text) for text in ("v5e:2x2x1", "v5p:2x2", "v7:2x2", "v5e:0x2")] == (
        [None] * 4
    )
    assert [default_topology(kind) for kind in tpu_kinds()] == [
        "v4:2x2x1",
        "v5e:2x2",
        "v5p:2x2x1",
        "v6e:2x2",
    ]


@pytest.mark.parametrize(
    ("text", "machine_type", "accelerator_type", "accelerators", "topology"),
    [
        ("t4", "n1-standard-8", "NVIDIA_TESLA_T4", 1, None),
        ("l4:4", "g2-standard-48", "NVIDIA_L4", 4, None),
        ("a100", "a2-highgpu-1g", "NVIDIA_TESLA_A100", 1, None),
        ("a100-80gb:8", "a2-ultragpu-8g", "NVIDIA_A100_80GB", 8, None),
        # Fewer than eight exist as spot machines only.
        ("h100", "a3-highgpu-8g", "NVIDIA_H100_80GB", 8, None),
        ("v5e", "ct5lp-hightpu-4t", None, 4, "2x2"),
        ("v5litepod-8", "ct5lp-hightpu-8t", None, 8, "2x4"),
        ("cpu:32", "n2-standard-32", None, 0, None),
    ],
)
def test_machines_of_vertex(text, machine_type, accelerator_type, accelerators, topology):
    found = find_vertex_machine(text)
    assert found.machine_type == machine_type
    assert found.accelerator_type == accelerator_type
    assert (found.accelerators, found.tpu_topology) == (accelerators, topology)
    expected = "tpu" if topology else "gpu" if accelerators else "cpu"
    assert found.environment == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l4:3", "expected one of l4:1, l4:2, l4:4, l4:8"),
        ("h200", "expected one of t4, v100, l4, a100, a100-80gb, h100, v5e, cpu"),
        ("v5litepod-16", "v5e:1x1, v5e:2x2, v5e:2x4; other slices .* `multihot submit tpu`"),
        ("v6e", "Vertex AI trains with JAX and PyTorch alone on v6e .*; .*`multihot submit tpu`"),
    ],
)
def test_machines_that_vertex_has_not(text, message):
    with pytest.raises(UserError, match=rf"--accelerator={text}: .*{message}"):
        find_vertex_machine(text)


def test_vertex_takes_the_names_of_accelerators():
    """Its messages know no others; the machine types are checked by its servers alone."""
    types = pytest.importorskip("google.cloud.aiplatform_v1.types")
    for machine in vertex_machines():
        if machine.accelerator_type:
            assert machine.accelerator_type in types.AcceleratorType.__members__
