"""Beam: the shards of the local command byte for byte, and its scores for the same ids."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from trainer import prepare, score
from trainer.config import PrepareConfig, ScoreConfig
from trainer.errors import UserError
from trainer.scoring.plan import plan_parts

NUM_ROWS = 200
TWO_PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


@pytest.fixture(scope="module")
def rows(documents, tmp_path_factory) -> str:
    """Docstrings with a column to keep, three of the rows unusable, in two files."""
    folder = tmp_path_factory.mktemp("beam")
    with open(documents, encoding="utf-8") as file:
        values = [json.loads(line) | {"rank": rank} for rank, line in enumerate(file)][:NUM_ROWS]
    lines = [json.dumps(value) for value in values]
    lines[7] = "{broken"
    lines[90] = json.dumps({"id": "empty", "text": " ", "labels": []})
    lines[150] = json.dumps({"id": "none", "labels": []})
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in lines[:120]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(line + "\n" for line in lines[120:]))
    return str(folder)


def score_config(model, rows, output, **changes):
    flags = {
        "precision": "float32",
        "rows_per_part": 40,
        "max_rejected": 3.0,
        "keep_columns": ("rank",),
    } | changes
    return ScoreConfig(model=model, input=(rows,), output_dir=str(output), **flags)


def read_lines(output):
    return [
        json.loads(line)
        for path in sorted(Path(output).glob("part-*.jsonl.gz"))
        for line in gzip.open(path, "rt", encoding="utf-8")
    ]


def read_rejected(output):
    return [
        json.loads(line)
        for path in sorted(Path(output, "rejected").iterdir())
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def local_scores(model, rows, tmp_path_factory):
    """What the local command writes."""
    output = tmp_path_factory.mktemp("local") / "out"
    score.run(score_config(model, rows, output))
    return output


def check_scores(output, expected_output):
    """The ids in order, kept columns, rejected rows and counts are the same, scores to 1e-5."""
    found, expected = read_lines(output), read_lines(expected_output)
    assert len(expected) == NUM_ROWS - 3
    for line, other in zip(found, expected, strict=True):
        assert (line["id"], line["rank"]) == (other["id"], other["rank"])
        assert list(line["scores"]) == list(other["scores"])
        values, others = (np.array(list(item["scores"].values())) for item in (line, other))
        assert np.abs(values - others).max() < 1e-5
    assert sum(a["labels"] != b["labels"] for a, b in zip(found, expected, strict=True)) <= 1
    assert read_rejected(output) == read_rejected(expected_output)
    counts = ("parts", "rows_in", "rows_out", "rows_rejected", "rows_truncated")
    of_found, of_expected = (
        json.loads((folder / "_SUCCESS").read_text()) for folder in (output, expected_output)
    )
    assert [of_found[name] for name in counts] == [of_expected[name] for name in counts]
    assert not list(output.rglob("*.tmp"))


def test_scores_are_those_of_the_local_command(model, rows, local_scores, tmp_path, capsys):
    output = tmp_path / "out"
    score.run(score_config(model, rows, output, runner="DirectRunner"))
    check_scores(output, local_scores)
    said = capsys.readouterr().out
    assert f"rejected 3, rows {NUM_ROWS}, scored {NUM_ROWS - 3}" in said
    # A rerun does only what is missing.
    before = {path.name: path.read_bytes() for path in output.glob("part-*")}
    (output / "_SUCCESS").unlink()
    (output / "manifests" / "part-00002-of-00005.json").unlink()
    summary = score.run(score_config(model, rows, output, runner="DirectRunner"))
    assert summary.documents == 39
    assert {path.name: path.read_bytes() for path in output.glob("part-*")} == before
    with pytest.raises(UserError, match="--runner=local: .* was begun with --runner=beam"):
        score.run(score_config(model, rows, output))


def test_parquet_has_the_same_scores(model, rows, local_scores, tmp_path):
    output = tmp_path / "out"
    score.run(score_config(model, rows, output, runner="DirectRunner", format="parquet"))
    paths = sorted(map(str, output.glob("part-*.parquet")))
    found = [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]
    for row, expected in zip(found, read_lines(local_scores), strict=True):
        assert row["id"] == expected["id"]
        values = np.array([value for _, value in row["scores"]])
        assert np.abs(values - list(expected["scores"].values())).max() < 1e-5


@pytest.mark.long
def test_scores_of_two_processes(model, rows, local_scores, tmp_path):
    output = tmp_path / "out"
    options = {"runner": "DirectRunner", "beam_options": TWO_PROCESSES}
    score.run(score_config(model, rows, output, **options))
    check_scores(output, local_scores)


def prepare_config(rows, data_dir, **changes):
    flags = {"vocab_size": 300, "max_seq_length": 64, "max_rejected": 3.0, "num_shards": 2}
    return PrepareConfig(input=(rows,), data_dir=str(data_dir), **(flags | changes))


def read_data(data_dir):
    """All files by name; metadata.json without what names the call."""
    files = {
        str(path.relative_to(data_dir)): path.read_bytes()
        for path in Path(data_dir).rglob("*")
        if path.is_file()
    }
    return files


def check_data(rows, tmp_path, **options):
    for name, changes in (("local", {"num_workers": 1}), ("beam", options)):
        os.makedirs(tmp_path / name)
        prepare.run(prepare_config(rows, tmp_path / name / "data", **changes))
    local, beam = (read_data(tmp_path / name / "data") for name in ("local", "beam"))
    assert len([name for name in local if name.endswith(".tfrecord")]) == 6
    assert beam == local


def test_shards_are_those_of_the_local_command(rows, tmp_path):
    check_data(rows, tmp_path, runner="DirectRunner")


@pytest.mark.long
def test_shards_of_two_processes(rows, tmp_path):
    check_data(rows, tmp_path, runner="DirectRunner", beam_options=TWO_PROCESSES)


def test_parts_go_apart_where_their_file_can_be_entered_and_within_the_limit(tmp_path):
    from trainer.beam.score_pipeline import _pipelines, _runs

    rows = [{"text": f"text {index}"} for index in range(90)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    _, parts = plan_parts([str(tmp_path / name) for name in ("a.parquet", "b.jsonl.gz")], 10)
    assert list(_runs(parts, range(18), 5, None)) == [
        *((place,) for place in range(9)), tuple(range(9, 18))
    ]  # fmt: skip
    # Four parts of ten rows with five labels are 200 cells.
    runs = list(_runs(parts, range(18), 5, 200))
    assert runs[9:] == [(9, 10, 11, 12), (13, 14, 15, 16), (17,)]
    pipelines = list(_pipelines(parts, runs, 5, 200))
    assert [[place for run in runs for place in run] for runs in pipelines] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8], [9, 10, 11, 12], [13, 14, 15, 16], [17]
    ]  # fmt: skip
    assert [runs] == list(_pipelines(parts, runs, 5, None))


def test_a_fault_of_the_user_in_a_worker_is_one_line(model, rows, tmp_path):
    folder = tmp_path / "rows"
    shutil.copytree(rows, folder)
    whole = (folder / "b.jsonl.gz").read_bytes()
    config = score_config(model, str(folder), tmp_path / "out", runner="DirectRunner")
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    shutil.rmtree(broken / "saved_model")
    with pytest.raises(UserError, match=r"saved_model: no such folder; export the model again"):
        score.run(score_config(str(broken), str(folder), tmp_path / "o", runner="DirectRunner"))
    (folder / "b.jsonl.gz").write_bytes(whole[:-200])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: damaged or cut short"):
        score.run(config)
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: damaged or cut short"):
        prepare.run(prepare_config(str(folder), tmp_path / "data", runner="DirectRunner"))
    assert not (tmp_path / "data").exists()


def test_no_part_is_made_of_an_input_that_changed(model, rows, tmp_path, monkeypatch):
    folder = tmp_path / "rows"
    shutil.copytree(rows, folder)
    whole = (folder / "a.jsonl").read_bytes()
    save_plan = score.save_plan

    def save_and_change(output, plan):
        (folder / "a.jsonl").write_bytes(whole[::-1].replace(b"\n", b" ", 1)[::-1])
        return save_plan(output, plan)

    monkeypatch.setattr(score, "save_plan", save_and_change)
    config = score_config(model, str(folder), tmp_path / "out", runner="DirectRunner")
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read"):
        score.run(config)
    done = [path.name for path in (tmp_path / "out" / "manifests").glob("*.json")]
    assert all(name >= "part-00003" for name in done)


def test_no_other_model_goes_on_with_a_folder(model, rows, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model, other)
    config = score_config(str(other), rows, tmp_path / "out", runner="DirectRunner")
    variables = next((other / "saved_model" / "variables").glob("*data*"))
    content = bytearray(variables.read_bytes())
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    with pytest.raises(UserError, match="saved_model: damaged, or not the one that was exported"):
        score.run(config)
    shutil.rmtree(other)
    shutil.copytree(model, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"gelu"', '"relu"'))
    with pytest.raises(UserError, match="its parts come from the model"):
        score.run(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"runner": "NoRunner"}, "--runner=NoRunner: .*expected local or the name of a Beam"),
        ({"runner": "DirectRunner", "beam_options": ("--no_option=1",)}, "no option --no_option"),
        ({"runner": "DirectRunner", "num_workers": 2, "worker_index": 0}, "workers of its own"),
        ({"beam_options": ("--project=p",)}, "none with --runner=local"),
    ],
)
def test_wrong_runners_and_options_are_one_line(model, rows, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        score.run(score_config(model, rows, tmp_path / "out", **flags))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_local_commands_do_not_import_beam():
    code = (
        "import sys; from trainer import prepare, score, cli;"
        "assert 'tensorflow' in sys.modules and 'apache_beam' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prepare_wants_a_folder_that_all_workers_share(rows):
    config = prepare_config(rows, "gs://b/data", runner="FlinkRunner")
    with pytest.raises(UserError, match="FlinkRunner's workers exchange files in the data folder"):
        prepare.run(config)
