"""docs/cloud.md: its commands are valid, and its tables are those of the table of accelerators."""

import json
import re
import shlex
from pathlib import Path

import pytest
from submitting import use_small_package

from launch import accelerators
from launch.cloud import package
from trainer import cli
from trainer.flags import parse_flags

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "cloud.md").read_text(encoding="utf-8")
VARIABLES = {
    "PROJECT": "my-project",
    "ZONE": "us-central1-a",
    "BUCKET": "my-project-multihot",
    "ACCOUNT": "multihot@my-project.iam.gserviceaccount.com",
}


def read_commands():
    """The commands of all Bash blocks as words, with variables replaced."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    for name, value in VARIABLES.items():
        lines = [re.sub(rf"\${name}\b", value, line) for line in lines]
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = read_commands()


def test_every_command_is_of_a_known_tool():
    assert len(COMMANDS) >= 35
    assert {words[0] for words in COMMANDS} == {"export", "gcloud", "make", "multihot"}
    assert not any("$" in word for words in COMMANDS for word in words)


@pytest.mark.parametrize(
    "words", [words for words in COMMANDS if words[:2] == ["multihot", "submit"]], ids=" ".join
)
def test_submissions_print_valid_requests(words, monkeypatch, capsys):
    use_small_package(monkeypatch)
    monkeypatch.setattr(package, "build_wheel", lambda: ("the.whl", b""))
    pytest.importorskip("google.cloud.tpu_v2")
    end = words.index("--")
    cli.main([*words[1:end], "--dry_run", *words[end:]])
    requests = json.loads(capsys.readouterr().out)
    if words[2] == "dataflow":
        assert requests["runner"] == "DataflowRunner" and requests["command"] == words[end + 1 :]
        return
    (record,) = [item["content"] for item in requests if "content" in item]
    submitted = [word for command in record["commands"] for word in ("--", *command)]
    assert submitted == words[end:]
    created = [item["method"] for item in requests if item["method"].startswith("Create")]
    assert created == ["CreateQueuedResource" if words[2] == "tpu" else "CreateCustomJob"]


def test_other_commands_parse():
    others = [words[1:] for words in COMMANDS if words[0] == "multihot" and words[1] != "submit"]
    assert len(others) == 3
    for words in others:
        parse_flags(cli.config_of(" ".join(words[:2])), words[2:])


def test_targets_and_variables_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text()
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    for words in COMMANDS:
        if words[0] != "make":
            continue
        target, *assigned = words[1:]
        assert re.search(rf"^{target}: .*## ", makefile, re.MULTILINE), target
        assert {item.partition("=")[0] for item in assigned} <= variables, words
    exports = [word for words in COMMANDS if words[0] == "export" for word in words[1:]]
    names = {word.partition("=")[0] for word in exports}
    assert names == {"PROJECT", "ZONE", "BUCKET", "ACCOUNT", "SUBMIT_FLAGS"}
    assert names - {"ACCOUNT"} <= variables


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_are_those_that_the_commands_read():
    """Every kind, its figures, its numbers, and whether it warns."""
    rows: dict[str, list[str]] = {}
    for line in TEXT.splitlines():
        if line.startswith("| `") and len(row := cells(line)) == 4:
            rows.setdefault(row[0].strip("`"), row[1:])  # `v5e` is a row of both tables.
    for name, kind in accelerators.tpu_kinds().items():
        hbm = f"{kind.hbm_bytes / (1 << 30):.2f} GiB" if kind.hbm_bytes else "not known"
        figures, one, several = rows[name]
        assert figures == f"{kind.bf16_flops / 1e12:.0f} TFLOP/s, {hbm}"
        slices = [item for item in accelerators.tpu_slices() if item.kind == kind]
        small = [item for item in slices if item.hosts == 1]
        shown = ", ".join(f"`{item.name}`" for item in small)
        assert one == (f"warns: {shown}" if small[0].warning else shown)
        assert several == "warns" and all(item.warning for item in slices if item.hosts > 1)
    table = json.loads((ROOT / "launch" / "accelerators.json").read_text())["gpu"]
    for name, row in table.items():
        figures, counts, note = rows[name]
        memory = row["memory_bytes"] // (1 << 30)
        assert figures == f"{memory} GiB, {row['flops'] / 1e12:.0f} TFLOP/s {row['flops_type']}"
        assert counts == ", ".join(row["machines"])
        spot = ", ".join(map(str, row["spot_only"]))
        expected = "warns" if row["warning"] else ""
        assert note == (f"{spot} by `spot` or `flex_start` only" if spot else expected)
    machines = [item.name for item in accelerators.vertex_machines()]
    line = next(line for line in TEXT.splitlines() if line.startswith("| `v5e` | |"))
    shown = ", ".join(f"`{name}`" for name in machines if name.startswith("v5e:"))
    assert cells(line)[2:] == [shown, "warns"]
    counts = ", ".join(name.partition(":")[2] for name in machines if name.startswith("cpu:"))
    assert f"| `cpu` | | {counts} virtual CPUs | |" in TEXT


def test_what_was_never_run_is_said():
    assert "none of it against Google's servers" in " ".join(TEXT.split())
    assert re.search(r"Never done: a request to Google's servers", TEXT)
