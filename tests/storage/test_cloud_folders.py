"""prepare, export and score on gs:// through a fake that fails: the files of local folders."""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path

import pytest
from fake_gcs import random_faults
from preparing import config, write_rows

from trainer import export, prepare, score
from trainer.config import ScoreConfig
from trainer.errors import RunAgain, UserError
from trainer.model.model_folder import load_model_folder
from trainer.run_config import ExportConfig
from trainer.storage import gcs, gcs_client
from trainer.storage.output_folder import open_output

WORDS = "market price rise fall rain wind sun storm goal match team player vote law court".split()


def read_tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def run_score(model, source, output, **flags):
    return score.run(
        ScoreConfig(model=model, input=(str(source),), output_dir=str(output), **flags)
    )


def read_bucket(cloud, prefix):
    return {
        name.removeprefix(f"{prefix}/"): stored.data
        for name, stored in cloud.buckets["b"].items()
        if name.startswith(f"{prefix}/")
    }


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, which has to be empty in the end."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    # TensorFlow removes its own when the process ends.
    assert [path for path in folder.iterdir() if "autograph" not in path.name] == []


@pytest.fixture
def rows(tmp_path):
    """40 rows with two labels, one of them with a text that repeats."""
    texts = [" ".join(WORDS[i % 15 : i % 15 + 5]) + f" {i}" for i in range(39)]
    rows = [
        {"id": f"r{i}", "text": text, "labels": ["a", "bc"[i % 2]]}
        for i, text in enumerate([*texts, texts[0]])
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_prepare_writes_the_same_files_and_adds_splits(cloud, rows, temporary, tmp_path, capsys):
    more = write_rows(tmp_path / "more.jsonl", [json.loads(rows.read_text().splitlines()[3])])
    local = tmp_path / "local"
    commands = [
        (rows, {"split": "train:0.7,test:0.3", "vocab_size": 150, "num_shards": 2}),
        (more, {"split": "more"}),
    ]
    for path, flags in commands:
        prepare.run(config(path, local, **flags))
    expected_lines = capsys.readouterr().out.replace(str(local), "gs://b/deep/data")
    cloud.plan = random_faults(3, 0.15)
    for path, flags in commands:
        prepare.run(config(path, "gs://b/deep/data", **flags))
    assert read_bucket(cloud, "deep/data") == read_tree(local)
    assert "more" in json.loads((local / "metadata.json").read_text())["splits"]
    assert len(cloud.faults) >= 3
    lines = capsys.readouterr().out
    assert [line.split(" pass 1")[0] for line in lines.splitlines()] == [
        line.split(" pass 1")[0] for line in expected_lines.splitlines()
    ]
    assert "train and more: documents of more whose text train has too: 1" in lines
    prepare.run(config(more, "gs://b/deep/data", split="more"))
    assert "prepared by this command already; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="gs://b/deep/data: already holds the splits train"):
        prepare.run(config(rows, "gs://b/deep/data", split="more"))


def test_what_a_killed_prepare_left_is_used_and_somebody_else_s_is_left(cloud, rows, temporary):
    flags = {"split": "train:0.7,test:0.3", "vocab_size": 150, "num_shards": 2}
    prepare.run(config(rows, "gs://b/data", **flags))
    whole = read_bucket(cloud, "data")
    assert len(whole) == 11
    # Killed while it uploaded: some files are there, metadata.json is not.
    for name in ("metadata.json", "train-00001-of-00002.tfrecord", "tokenizer/tokenizer.json"):
        del cloud.buckets["b"][f"data/{name}"]
    generations = {name: item.generation for name, item in cloud.buckets["b"].items()}
    prepare.run(config(rows, "gs://b/data", **flags))
    assert read_bucket(cloud, "data") == whole
    kept = {name: cloud.buckets["b"][name].generation for name in generations}
    assert kept == generations
    del cloud.buckets["b"]["data/metadata.json"]
    cloud.put("b", "data/test-00001-of-00002.tfrecord", b"of another command")
    before = read_bucket(cloud, "data")
    with pytest.raises(UserError, match=r"data/test-00001-of-00002.tfrecord: is there already"):
        prepare.run(config(rows, "gs://b/data", **flags))
    assert read_bucket(cloud, "data") == before


def without_owner(monkeypatch):
    """Two commands each take the folder for theirs, as when one could not reach the store."""
    monkeypatch.setattr(prepare, "owning", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(export, "owned", lambda *_: contextlib.nullcontext())


def test_of_two_prepares_at_once_neither_spoils_the_other_s(cloud, rows, temporary, monkeypatch):
    flags = {"split": "all", "vocab_size": 150, "num_shards": 1}
    upload_files, calls = gcs.upload_files, []

    def one_after_the_other(url, folder, names, generations=None):
        calls.append(names)
        if len(calls) == 1:  # The second one starts and ends before the first has uploaded.
            prepare.run(config(rows, url, seed=5, **flags))
        return upload_files(url, folder, names, generations)

    monkeypatch.setattr(gcs, "upload_files", one_after_the_other)
    without_owner(monkeypatch)
    with pytest.raises(UserError, match="another `multihot prepare` has written it meanwhile"):
        prepare.run(config(rows, "gs://b/data", **flags))
    metadata = json.loads(cloud.buckets["b"]["data/metadata.json"].data)
    assert metadata["source"]["calls"][0]["seed"] == 5
    for shard in metadata["splits"]["all"]["shards"]:
        found = gcs.find_object(f"gs://b/data/{shard['name']}")
        assert found.checksum == shard["checksum"]


def test_of_two_exports_at_once_one_stops(cloud, model, temporary, monkeypatch):
    run = str(Path(model).parent / "run")
    upload_files, calls = export.upload_files, []

    def one_within_the_other(url, folder, names, generations):
        made = upload_files(url, folder, names, generations)
        calls.append(names)
        if len(calls) == 1:  # The second one takes the first's files for left ones.
            export.run(ExportConfig(model_dir=run, export_dir="gs://b/model"))
        return made

    monkeypatch.setattr(export, "upload_files", one_within_the_other)
    without_owner(monkeypatch)
    with pytest.raises(UserError, match="--export_dir=gs://b/model: "):
        export.run(ExportConfig(model_dir=run, export_dir="gs://b/model"))
    assert len(calls) == 2
    assert load_model_folder("gs://b/model").fingerprint == load_model_folder(model).fingerprint


def test_prepare_leaves_its_rejected_rows_in_the_store(cloud, temporary, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "labels": ["x"]}, {"text": 3}] * 9)
    with pytest.raises(UserError, match=r"see gs://b/data/rejected/all.jsonl") as caught:
        prepare.run(config(rows, "gs://b/data", split="all"))
    assert str(temporary) not in str(caught.value)
    assert list(read_bucket(cloud, "data")) == ["rejected/all.jsonl"]


def test_a_folder_that_is_finished_meanwhile_is_left_as_it_is(cloud, rows, temporary, monkeypatch):
    upload_files = gcs.upload_files

    def meanwhile(*arguments, **flags):
        cloud.put("b", "data/metadata.json", b"{}")
        return upload_files(*arguments, **flags)

    monkeypatch.setattr(gcs, "upload_files", meanwhile)
    with pytest.raises(UserError, match="another `multihot prepare` has written it meanwhile"):
        prepare.run(config(rows, "gs://b/data", split="all", vocab_size=150))
    assert cloud.buckets["b"]["data/metadata.json"].data == b"{}"


def test_export_and_score_write_the_same_files(cloud, model, documents, temporary, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(documents).read_text().splitlines(keepends=True)[:100]))
    run = str(Path(model).parent / "run")
    cloud.plan = random_faults(2, 0.1)
    export.run(ExportConfig(model_dir=run, export_dir="gs://b/model"))
    files = read_bucket(cloud, "model")
    same = {name for name, data in read_tree(model).items() if files[name] == data}
    assert {"multihot.json", "model.safetensors", "tokenizer.json", "config.json"} <= same
    assert load_model_folder("gs://b/model").fingerprint == load_model_folder(model).fingerprint
    generation = cloud.generation
    export.run(ExportConfig(model_dir=run, export_dir="gs://b/model"))  # Does nothing again.
    assert cloud.generation == generation
    with pytest.raises(UserError, match="gs://b/model: holds multihot.json"):
        export.run(ExportConfig(model_dir=run, export_dir="gs://b/model", uncalibrated=True))
    with pytest.raises(UserError, match="gs://b/none: no multihot.json"):
        load_model_folder("gs://b/none")
    with_onnx = ExportConfig(model_dir=run, export_dir="gs://b/model", formats=("onnx",))
    with pytest.raises(UserError, match="gs://b/model: holds multihot.json"):
        export.run(with_onnx)
    with_onnx = dataclasses.replace(with_onnx, export_dir="gs://b/onnx")
    export.run(with_onnx)
    assert {"onnx/model.onnx", "multihot.json"} <= set(read_bucket(cloud, "onnx"))
    generation = cloud.generation
    export.run(with_onnx)
    assert cloud.generation == generation

    cloud.put("b", "in/few.jsonl", few.read_bytes())
    for kind in ("jsonl", "parquet"):
        flags = {"format": kind, "rows_per_part": 17}
        run_score(model, few, tmp_path / kind, **flags)
        ending = "jsonl.gz" if kind == "jsonl" else kind
        summary = run_score("gs://b/model", "gs://b/in/", f"gs://b/{kind}", **flags)
        assert summary.documents == 100
        found, expected = read_bucket(cloud, kind), read_tree(tmp_path / kind)
        plans = found.pop("plan.json"), expected.pop("plan.json")
        assert found == expected and f"part-00005-of-00006.{ending}" in found
        found_plan = json.loads(plans[0].decode().replace("gs://b/in/few.jsonl", str(few)))
        expected_plan = json.loads(plans[1])
        assert found_plan.pop("sha256") != expected_plan.pop("sha256")
        assert found_plan == expected_plan
    assert sum(cloud.faults.values()) >= 20, cloud.faults


@pytest.fixture
def begun(cloud, model, documents, tmp_path):
    """A finished folder of three parts of 10 rows; how to run it again."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(documents).read_text().splitlines(keepends=True)[:30]))

    def run(**changes):
        values = {"rows_per_part": 10} | changes
        return run_score(model, few, "gs://b/out", **values).documents

    assert run() == 30
    return run


def test_a_part_left_by_a_killed_run_or_damaged_is_written_again(cloud, begun, capsys):
    finished = read_bucket(cloud, "out")
    objects = cloud.buckets["b"]
    del objects["out/_SUCCESS"], objects["out/manifests/part-00000-of-00003.json"]
    objects["out/part-00002-of-00003.jsonl.gz"].data = b"other bytes"
    cloud.put("b", "out/part-00000-of-00003.jsonl.gz", b"of a killed run")
    cloud.plan = random_faults(4, 0.1)
    assert begun() == 20
    assert read_bucket(cloud, "out") == finished
    capsys.readouterr()
    assert begun() == 0 and "all 3 parts are there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was begun with --scores=all"):
        begun(scores="top:1")


def test_two_writers_of_one_part_are_kept_apart(cloud, begun):
    finished = read_bucket(cloud, "out")
    part, manifest = "part-00001-of-00003.jsonl.gz", "manifests/part-00001-of-00003.json"
    for name in ("_SUCCESS", part, manifest):
        del cloud.buckets["b"][f"out/{name}"]
    writers = [open_output("gs://b/out").open_part(part, manifest) for _ in range(2)]
    for writer in writers:
        writer.file.write(finished[part])
    writers[1].name_part()
    with pytest.raises(UserError, match=f"gs://b/out/{part}: another `multihot score` is writing"):
        writers[0].name_part()
    # A third took the second's part for one that a killed run left, and was quicker.
    third = open_output("gs://b/out").open_part(part, manifest)
    third.file.write(finished[part])
    third.name_part()
    with pytest.raises(UserError, match="another `multihot score`"):
        writers[1].name_manifest(finished[manifest])
    third.name_manifest(finished[manifest])
    assert open_output("gs://b/out").open_part(part, manifest) is None
    assert begun() == 0
    assert read_bucket(cloud, "out") == finished


def test_another_score_that_starts_at_the_same_time_stops_or_finds_nothing_to_do(cloud, begun):
    finished = read_bucket(cloud, "out")
    for name in list(cloud.buckets["b"]):
        del cloud.buckets["b"][name]
    cloud.plan = random_faults(6, 0.1)
    ends = []

    def run():
        try:
            ends.append(begun())
        except UserError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begun()
    assert read_bucket(cloud, "out") == finished
    lines = [end for end in ends if isinstance(end, str)]
    assert all("another `multihot score`" in line and "\n" not in line for line in lines)
    assert len(lines) < 2


def test_a_store_that_goes_away_is_a_reason_to_run_again(cloud, begun, monkeypatch):
    monkeypatch.setattr(gcs_client, "_DEADLINE_SECONDS", 0.5)
    finished = read_bucket(cloud, "out")
    for name in ("_SUCCESS", "manifests/part-00001-of-00003.json"):
        del cloud.buckets["b"][f"out/{name}"]
    cloud.plan = lambda request: "503" if request.startswith("POST") else ""
    with pytest.raises(RunAgain, match="did not answer .HTTP 503."):
        begun()
    cloud.plan = lambda request: ""
    assert begun() == 10
    assert read_bucket(cloud, "out") == finished
