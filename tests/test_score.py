"""Scoring: right numbers in the rows' order, parts that depend on nothing else, restarts."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from trainer import cli, score
from trainer.config import ScoreConfig
from trainer.errors import UserError
from trainer.evaluation.thresholds import round_thresholds
from trainer.storage.filesystem import add_checksum
from trainer.storage.output_folder import open_output

NUM_ROWS = 1000


def make_config(model, source, output, **changes):
    sources = tuple(map(str, source)) if isinstance(source, list) else (str(source),)
    changes = {"precision": "float32"} | changes  # On every processor.
    return ScoreConfig(model=str(model), input=sources, output_dir=str(output), **changes)


def run_score(model, source, output, **changes):
    return score.run(make_config(model, source, output, **changes))


def read_part(path):
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def read_scores(output):
    return [row for path in sorted(Path(output).glob("part-*")) for row in read_part(path)]


def read_tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(model, documents, tmp_path_factory) -> Path:
    """What an uninterrupted run writes: 1,000 rows in parts of 90, all scores."""
    output = tmp_path_factory.mktemp("finished") / "out"
    summary = run_score(model, documents, output, rows_per_part=90)
    assert summary.documents == NUM_ROWS
    return output


def test_probabilities_are_those_of_transformers_in_the_rows_order(model, documents, finished):
    rows, lines = read_rows(documents), read_scores(finished)
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, trust_remote_code=True
    ).eval()
    with open(os.path.join(model, "multihot.json"), encoding="utf-8") as file:
        description = json.load(file)
    names = description["labels"]
    cuts = [np.inf if cut is None else cut for cut in description["thresholds"]]
    for row, line in list(zip(rows, lines, strict=True))[::20]:
        inputs = tokenizer(row["text"], truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            expected = torch.sigmoid(peer(**inputs).logits)[0].numpy()
        assert list(line["scores"]) == names
        found = np.array(list(line["scores"].values()))
        assert np.abs(found - expected).max() < 1e-5
        clear = np.abs(expected - cuts) > 1e-5
        chosen = [name in line["labels"] for name in names]
        assert (np.array(chosen) == (expected >= cuts))[clear].all()


def test_manifests_and_success_account_for_every_row(finished):
    manifests = [json.loads(path.read_text()) for path in sorted(finished.glob("manifests/*"))]
    assert [item["rows_in"] for item in manifests] == [90] * 11 + [10]
    assert [item["rows_out"] for item in manifests] == [90] * 11 + [10]
    for item in manifests:
        part = finished / f"{item['part']}.jsonl.gz"
        assert part.stat().st_size == item["bytes"]
        assert len(read_part(part)) == item["rows_out"]
    success = json.loads((finished / "_SUCCESS").read_text())
    assert success["parts"] == 12 and success["rows_out"] == NUM_ROWS
    assert sum(item["bytes"] for item in manifests) == success["bytes"]


def test_gzip_headers_hold_neither_time_nor_name(finished):
    # Magic, deflate, no flags, time 0, then the level and the system.
    assert {path.read_bytes()[:8].hex() for path in finished.glob("part-*")} == {"1f8b080000000000"}


def test_a_part_s_bytes_depend_on_its_rows_alone(model, documents, finished, tmp_path):
    """The same rows cut into other files, and compressed, give the same parts."""
    rows = read_rows(documents)
    compressed = tmp_path / "all.jsonl.gz"
    compressed.write_bytes(gzip.compress(Path(documents).read_bytes()))
    split = [
        write_rows(tmp_path / "a.jsonl", rows[:180]),
        write_rows(tmp_path / "b.jsonl", rows[180:]),
    ]
    for index, source in enumerate([compressed, split]):
        output = tmp_path / f"out-{index}"
        run_score(model, source, output, rows_per_part=90)
        for path in sorted(finished.glob("part-*")):
            assert (output / path.name).read_bytes() == path.read_bytes()


def test_formats_and_small_files_share_a_part(model, documents, tmp_path):
    rows = [row for row in read_rows(documents) if "\n" not in row["text"]][:30]
    (tmp_path / "c.txt").write_text("".join(row["text"] + "\n" for row in rows[:10]))
    table = ["name\tbody"] + [f"{row['id']}\t{row['text']}" for row in rows[10:20] if "\t" not in
                              row["text"] and '"' not in row["text"]]  # fmt: skip
    (tmp_path / "d.tsv").write_text("\n".join(table) + "\n")
    run_score(model, tmp_path / "c.txt", tmp_path / "text")
    lines = read_scores(tmp_path / "text")
    assert [line["id"] for line in lines] == [f"c.txt:{number}" for number in range(10)]
    run_score(model, tmp_path / "d.tsv", tmp_path / "table", text_field="body", id_field="name")
    assert [line["id"] for line in read_scores(tmp_path / "table")] == [
        line.split("\t")[0] for line in table[1:]
    ]
    # A text's probabilities do not depend on what it is packed with.
    many = write_rows(tmp_path / "many.jsonl", rows)
    run_score(model, many, tmp_path / "many")
    for line, other in zip(lines, read_scores(tmp_path / "many")[:10], strict=True):
        values, others = (np.array(list(item["scores"].values())) for item in (line, other))
        assert np.abs(values - others).max() < 1e-5


def test_short_documents_that_the_sampled_rows_did_not_announce(
    model, documents, tmp_path, monkeypatch
):
    """Only the first 256 rows choose the micro-batches; a row of 128 holds 42 of one word."""
    monkeypatch.setattr("trainer.scoring.pipeline._SAMPLED_ROWS", 256)
    rows = [row for row in read_rows(documents) if len(row["text"]) > 500][:256]
    rows += [{"id": f"short {number}", "text": "a"} for number in range(700)]
    assert len(rows) == 956
    source = write_rows(tmp_path / "mixed.jsonl", rows)
    run_score(model, source, tmp_path / "out", scores="top:1", tokens_per_batch=256)
    lines = read_scores(tmp_path / "out")
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    (name,) = {name for line in lines[256:] for name in line["scores"]}
    values = np.array([line["scores"][name] for line in lines[256:]])
    assert np.ptp(values) < 1e-5


def test_selections_write_the_same_numbers(model, documents, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", read_rows(documents)[:40])
    for selection in ("all", "top:3", "above:0.2"):
        run_score(model, few, tmp_path / selection, scores=selection)
    everything = read_scores(tmp_path / "all")
    for line, top, above in zip(
        everything, read_scores(tmp_path / "top:3"), read_scores(tmp_path / "above:0.2"),
        strict=True,
    ):  # fmt: skip
        ranked = sorted(line["scores"].items(), key=lambda item: -item[1])
        assert sorted(top["scores"].values()) == sorted(value for _, value in ranked[:3])
        assert above["scores"] == {name: value for name, value in ranked if value >= 0.2}
        assert line["labels"] == top["labels"] == above["labels"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_written_scores_reach_the_exported_thresholds_where_the_labels_say_so(
    model, documents, tmp_path, format
):
    """Thresholds that lie at scores and one float32 beside them, as fitted ones may."""
    run_score(model, documents, tmp_path / "first", format="parquet")
    table = pyarrow.parquet.read_table(*(tmp_path / "first").glob("part-*"))
    scores = np.array([[value for _, value in row] for row in table["scores"].to_pylist()])
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    description = json.loads((folder / "multihot.json").read_text())
    names = description["labels"]
    at = scores[np.arange(len(names)) * 7, np.arange(len(names))].astype(np.float32)
    at[::3] = np.nextafter(at[::3], np.float32(0))
    cuts = at.astype(np.float64)
    cuts[1::3] = np.nextafter(cuts[1::3], 1)
    for thresholds in (cuts.tolist(), [None, *round_thresholds(cuts[1:].tolist())]):
        description["thresholds"] = thresholds
        (folder / "multihot.json").write_text(json.dumps(description))
        output = tmp_path / f"out-{thresholds[0]}"
        run_score(str(folder), documents, output, format=format)
        if format == "jsonl":
            rows = read_scores(output)
        else:
            rows = pyarrow.parquet.read_table(*output.glob("part-*")).to_pylist()
        limits = [np.inf if cut is None else cut for cut in round_thresholds(thresholds)]
        assert len(rows) == NUM_ROWS
        for row in rows:
            values = dict(row["scores"])
            reached = [name for name, cut in zip(names, limits, strict=True) if values[name] >= cut]
            assert row["labels"] == reached
        assert sum(len(row["labels"]) for row in rows) > 100


def make_version_1(output):
    """Makes an output folder that of the version whose scores had six digits."""
    path = output / "plan.json"
    plan = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(add_checksum(plan | {"version": 1})))


def test_a_folder_of_the_version_with_fewer_digits_is_finished_or_refused(
    model, documents, finished, tmp_path, capsys
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    make_version_1(output)
    before = read_tree(output)
    assert run_score(model, documents, output, rows_per_part=90).documents == 0
    assert "nothing to do" in capsys.readouterr().out
    assert read_tree(output) == before
    for path in ("_SUCCESS", "part-00003-of-00012.jsonl.gz", "manifests/part-00003-of-00012.json"):
        (output / path).unlink()
    before = read_tree(output)
    with pytest.raises(UserError, match="begun by an older version, which writes scores with"):
        run_score(model, documents, output, rows_per_part=90)
    assert read_tree(output) == before


def test_a_rerun_does_only_what_is_missing(model, documents, finished, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    (output / "_SUCCESS").unlink()
    (output / "manifests" / "part-00003-of-00012.json").unlink()
    cut_short = output / "part-00007-of-00012.jsonl.gz"
    cut_short.write_bytes(cut_short.read_bytes()[:-1])
    (output / "part-00003-of-00012.jsonl.gz.tmp").write_bytes(b"left by a kill")
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.gz")}
    summary = run_score(model, documents, output, rows_per_part=90)
    assert summary.documents == 180
    changed = {
        path.name for path in output.glob("part-*") if path.stat().st_mtime_ns != before[path.name]
    }
    assert changed == {"part-00003-of-00012.jsonl.gz", "part-00007-of-00012.jsonl.gz"}
    assert read_tree(output) == read_tree(finished)
    capsys.readouterr()
    assert run_score(model, documents, output, rows_per_part=90).documents == 0
    assert "all 12 parts are there already; nothing to do" in capsys.readouterr().out


def test_success_is_not_there_while_a_part_is_missing(model, documents, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    name = "part-00003-of-00012"
    (output / f"{name}.jsonl.gz").unlink()
    (output / "manifests" / f"{name}.json").unlink()
    flags = {"rows_per_part": 90, "num_workers": 2}
    assert run_score(model, documents, output, worker_index=0, **flags).documents == 0
    assert not (output / "_SUCCESS").exists()
    assert run_score(model, documents, output, worker_index=1, **flags).documents == 90
    assert read_tree(output) == read_tree(finished)


def test_a_full_disk_is_one_line_and_leaves_nothing_aside(model, documents, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "trainer.cli", "score", f"--model={model}"]
    command += [f"--input={documents}", f"--output_dir={output}", "--format=parquet"]
    max_bytes = 20 << 10
    child = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes)),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2 and "Traceback" not in child.stderr
    last = child.stderr.splitlines()[-1]
    assert f"--output_dir={output}: cannot be written (File too large" in last
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["plan.json"]


def test_another_model_changed_input_and_other_settings_are_refused(
    model, documents, finished, tmp_path
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = read_tree(output)
    other = tmp_path / "model"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"][0] += 0.001
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its parts come from the model"):
        run_score(other, documents, output, rows_per_part=90)
    with pytest.raises(UserError, match="--scores=top:1: .* was begun with --scores=all"):
        run_score(model, documents, output, rows_per_part=90, scores="top:1")
    changed = tmp_path / "documents.jsonl"
    shutil.copy(documents, changed)
    with pytest.raises(UserError, match="not among the inputs"):
        run_score(model, [Path(documents), changed], output, rows_per_part=90)
    assert read_tree(output) == before


def test_a_flipped_byte_in_the_input_is_refused(model, documents, tmp_path):
    source = tmp_path / "documents.jsonl"
    write_rows(source, read_rows(documents)[:20])
    run_score(model, source, tmp_path / "out")
    contents = bytearray(source.read_bytes())
    contents[50] ^= 1
    source.write_bytes(contents)
    with pytest.raises(UserError, match=r"documents.jsonl: changed since .* was begun"):
        run_score(model, source, tmp_path / "out")


def test_rejected_rows_are_written_with_position_and_reason(model, documents, tmp_path):
    good = [json.dumps(row) for row in read_rows(documents)[:6]]
    lines = [*good[:2], "{broken", good[2], '{"id": "e", "text": " "}', '{"id": "n"}', *good[3:]]
    source = tmp_path / "mixed.jsonl"
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        run_score(model, source, tmp_path / "out", rows_per_part=5, max_rejected=2)
    message = str(caught.value)
    assert message.startswith("mixed.jsonl: row 2: not JSON")
    assert "3 of 9 rows cannot be used, --max_rejected=2 allows 2" in message
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    run_score(model, source, tmp_path / "out", rows_per_part=5, max_rejected=3)
    rejected = [
        row for path in sorted((tmp_path / "out" / "rejected").iterdir()) for row in read_rows(path)
    ]
    assert [(row["source"], row["row"]) for row in rejected] == [
        ("mixed.jsonl", 2), ("mixed.jsonl", 4), ("mixed.jsonl", 5)
    ]  # fmt: skip
    assert [row["reason"].split(":")[0] for row in rejected] == [
        "not JSON", "no text", "no field 'text'"
    ]  # fmt: skip
    assert [row["id"] for row in read_scores(tmp_path / "out")] == [
        json.loads(line)["id"] for line in good
    ]
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert (success["rows_in"], success["rows_out"], success["rows_rejected"]) == (9, 6, 3)


def test_rejected_rows_that_were_removed_are_written_again(model, tmp_path):
    rows = [{"id": str(at), "text": "some words" if at % 4 else ""} for at in range(20)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"rows_per_part": 10, "max_rejected": 5}
    run_score(model, source, tmp_path / "out", **flags)
    (path, other) = sorted((tmp_path / "out" / "rejected").iterdir())
    whole = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(whole[:-9])):
        damage()
        assert run_score(model, source, tmp_path / "out", **flags).documents == 7
        assert path.read_bytes() == whole and other.exists()


def test_a_part_of_nothing_but_unusable_rows_is_empty(model, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n" * 3)
    run_score(model, tmp_path / "bad.jsonl", tmp_path / "out", max_rejected=3)
    assert read_scores(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["rows_rejected"] == 3


@pytest.mark.parametrize(
    ("contents", "changes", "message"),
    [
        (None, {}, "no such file or folder"),
        ("", {}, "empty file"),
        ('{"body": "x"}\n', {}, "no column 'text'; found body"),
        ('{"text": "x"}\n', {"id_field": "key"}, "no column 'key'; found text"),
        ("\n\n", {}, "no rows"),
    ],
)
def test_an_input_that_cannot_be_scored_is_one_line(model, tmp_path, contents, changes, message):
    source = tmp_path / "in.jsonl"
    if contents is not None:
        source.write_text(contents)
    with pytest.raises(UserError, match=message) as caught:
        run_score(model, source, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_column_to_keep_that_nothing_has_is_told(model, tmp_path, capsys):
    table = tmp_path / "a.csv"
    table.write_text("text,country\nsome words,fr\n")
    flags = {"keep_columns": ("contry",)}
    with pytest.raises(UserError, match="no input has a column 'contry'; found text, country"):
        run_score(model, table, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
    row = {"id": "1", "text": "some words", "country": "fr", "hash": "0"}
    lines = write_rows(tmp_path / "a.jsonl", [row])
    run_score(model, lines, tmp_path / "out", **flags)
    warning = capsys.readouterr().err
    assert "warning: --keep_columns=contry: no input begins with rows that have a col" in warning
    assert "found id, text, country, hash; correct the name" in warning
    (line,) = read_scores(tmp_path / "out")
    assert line["contry"] is None


def test_input_in_the_output_folder_is_refused(model, tmp_path):
    (tmp_path / "in.txt").write_text("some text\n")
    with pytest.raises(UserError, match=r"in.txt: lies in --output_dir"):
        run_score(model, tmp_path / "in.txt", tmp_path)
    assert read_tree(tmp_path) == {"in.txt": b"some text\n"}


def test_a_folder_that_is_no_model_is_one_line(documents, tmp_path):
    with pytest.raises(UserError, match=r"no multihot.json; expected a folder that `multihot exp"):
        run_score(tmp_path, documents, tmp_path / "out")
    (tmp_path / "multihot.json").write_text('{"labels": []}')
    with pytest.raises(UserError, match=r"multihot.json: damaged \(fields are missing\)"):
        run_score(tmp_path, documents, tmp_path / "out")


def test_a_score_that_is_not_a_number_stops_the_run(model, documents, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][3] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    few = write_rows(tmp_path / "few.jsonl", read_rows(documents)[:5])
    with pytest.raises(UserError, match="a score that is not a number"):
        run_score(broken, few, tmp_path / "out")
    assert not list((tmp_path / "out").glob("manifests/*"))


def test_two_runs_cannot_write_one_part(model, documents, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    name = "part-00003-of-00012"
    (output / "manifests" / f"{name}.json").unlink()
    other = open_output(str(output)).open_part(f"{name}.jsonl.gz", f"manifests/{name}.json")
    assert other is not None
    with pytest.raises(UserError, match=f"{name}.jsonl.gz: another `multihot score` is writing"):
        run_score(model, documents, output, rows_per_part=90)
    other.abandon()
    assert run_score(model, documents, output, rows_per_part=90).documents == 90
    assert read_tree(output) == read_tree(finished)


def test_an_output_folder_that_cannot_be_made_exits_2(model, documents, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["score", f"--model={model}", f"--input={documents}"]
            + [f"--output_dir={tmp_path / 'file' / 'out'}"]
        )
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("file/out: not a directory")
