"""The plan: every row in exactly one part, and a rerun that would not continue it is refused."""

import dataclasses
import gzip
import json

import pytest

from trainer.errors import UserError
from trainer.model_config import PackingConfig
from trainer.scoring.plan import Plan, check_plan, describe_inputs, load_plan, plan_parts, save_plan
from trainer.sources.reader import read_row_range
from trainer.sources.rows import Columns
from trainer.storage.output_folder import open_output

PACKING = PackingConfig(row_groups=((2, 64), (1, 128)), max_documents=9, max_windows=9)
SETTINGS = {"scores": "all", "rows_per_part": 10}


def write_rows(path, numbers):
    lines = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in numbers)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


def rows_of(part):
    return [
        (row.id, row.text)
        for row_range in part.row_ranges
        for row in read_row_range(row_range, Columns())
    ]


@pytest.fixture
def inputs(tmp_path):
    """Files of 25, 3, 4 and 21 rows: one to cut, two to join, one compressed to cut."""
    return [
        write_rows(tmp_path / "a.jsonl", range(25)),
        write_rows(tmp_path / "b.jsonl", range(25, 28)),
        write_rows(tmp_path / "c.jsonl", range(28, 32)),
        write_rows(tmp_path / "d.jsonl.gz", range(32, 53)),
    ]


def test_large_files_are_cut_and_small_ones_joined(inputs):
    _, parts = plan_parts(inputs, rows_per_part=10)
    assert [part.num_rows for part in parts] == [10, 10, 8, 4, 10, 10, 1]
    assert [len(part.row_ranges) for part in parts] == [1, 1, 2, 1, 1, 1, 1]
    assert [part.name for part in parts][::6] == ["part-00000-of-00007", "part-00006-of-00007"]


@pytest.mark.parametrize("rows_per_part", [1, 7, 10, 1000])
def test_every_row_is_in_one_part_in_order_with_the_same_id(inputs, rows_per_part):
    _, parts = plan_parts(inputs, rows_per_part)
    rows = [row for part in parts for row in rows_of(part)]
    assert [text for _, text in rows] == [f"text {number}" for number in range(53)]
    assert [name for name, _ in rows[23:30]] == [
        "a.jsonl:23", "a.jsonl:24", "b.jsonl:0", "b.jsonl:1", "b.jsonl:2", "c.jsonl:0", "c.jsonl:1"
    ]  # fmt: skip
    assert rows[-1][0] == "d.jsonl.gz:20"
    assert max(part.num_rows for part in parts) <= max(rows_per_part, 1)


def test_files_of_the_same_name_give_different_ids(tmp_path):
    paths = []
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        paths.append(write_rows(tmp_path / folder / "notes.jsonl", range(2)))
    _, (part,) = plan_parts(paths, rows_per_part=10)
    assert [name for name, _ in rows_of(part)] == [
        "monday/notes.jsonl:0", "monday/notes.jsonl:1",
        "tuesday/notes.jsonl:0", "tuesday/notes.jsonl:1",
    ]  # fmt: skip


def make_plan(paths):
    return Plan("f" * 64, dict(SETTINGS), PACKING, *plan_parts(paths, 10))


def test_a_plan_comes_back_as_it_was_saved(tmp_path, inputs):
    folder = tmp_path / "out"
    folder.mkdir()
    output = open_output(str(folder))
    assert load_plan(output) is None
    plan = make_plan(inputs)
    assert save_plan(output, plan) and not save_plan(output, plan)
    assert load_plan(output) == plan
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    (folder / "plan.json").write_text(
        (folder / "plan.json").read_text().replace('"first_row": 10', '"first_row": 11', 1)
    )
    with pytest.raises(UserError, match="its content does not match its own sha256"):
        load_plan(output)
    check_plan(plan, str(folder), "f" * 64, SETTINGS, describe_inputs(inputs))


def test_the_parts_of_somebody_else_are_not_written_over(tmp_path):
    (tmp_path / "part-00000-of-00001.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match="holds parts but no plan.json"):
        load_plan(open_output(str(tmp_path)))


@pytest.mark.parametrize("contents", ["", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_plan_that_cannot_be_read_is_one_line(tmp_path, contents):
    (tmp_path / "plan.json").write_text(contents)
    with pytest.raises(UserError, match=r"plan.json: not a plan of this version"):
        load_plan(open_output(str(tmp_path)))


def test_another_model_and_other_settings_are_refused(inputs):
    plan = make_plan(inputs)
    with pytest.raises(UserError, match="come from the model ffffffffffff, but --model is aaaaaa"):
        check_plan(plan, "out", "a" * 64, SETTINGS, plan.inputs)
    with pytest.raises(UserError, match=r"--scores=top:3: out was begun with --scores=all"):
        check_plan(plan, "out", "f" * 64, SETTINGS | {"scores": "top:3"}, plan.inputs)


def test_changed_inputs_are_refused_by_name(inputs):
    plan = make_plan(inputs)
    cases = {
        "not among --input any more": plan.inputs[:1] + plan.inputs[2:],
        "not among the inputs in": (
            *plan.inputs, dataclasses.replace(plan.inputs[1], path="/new.jsonl")
        ),
        "changed since out was begun": (
            plan.inputs[0], dataclasses.replace(plan.inputs[1], checksum="0"), *plan.inputs[2:]
        ),
    }  # fmt: skip
    for message, changed in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            check_plan(plan, "out", "f" * 64, SETTINGS, changed)
        culprit = "/new.jsonl" if message == "not among the inputs in" else inputs[1]
        assert str(caught.value).startswith(culprit)


def test_one_flipped_byte_of_the_same_size_changes_an_input(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, range(25))
    (before,) = describe_inputs([str(path)])
    contents = bytearray(path.read_bytes())
    contents[100] ^= 1
    path.write_bytes(contents)
    (after,) = describe_inputs([str(path)])
    assert after.bytes == before.bytes and after.checksum != before.checksum
