"""Our files as a stranger may have made them: refused in one line, or harmless; nothing outside.

Each JSON file of a data folder, a run, a model folder and an output folder is changed in one place
at a time: every value and every subtree. The commands' loading steps then read it, checksums
recomputed. They end within seconds, by themselves or by a UserError.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from killing import read_tree
from preparing import ROWS, config, write_rows
from reported_run import NUM_LABELS, make_everything
from safetensors.numpy import load_file, save_file

from launch.job import Job
from launch.machine.node import read_index
from trainer import evaluate, export, prepare, report, score, train
from trainer.config import ScoreConfig
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.linear.baseline import read_kept
from trainer.model.model_folder import check_saved_model, load_model_folder
from trainer.model.pretrained import load_pretrained, model_config
from trainer.preparation.data_folder import open_work_folder
from trainer.run_config import EvaluateConfig, ExportConfig, ReportConfig, TrainConfig
from trainer.runtime.cluster import read_cluster
from trainer.runtime.owner import OWNER_FILE
from trainer.sources.listing import list_files
from trainer.storage.filesystem import add_checksum
from trainer.training.checkpoint import load_best
from trainer.training.checkpoint_folder import CheckpointFolder
from trainer.training.losses import positive_weights

# What stands in the place of a value, as text: some of it is no JSON that Python would write.
STRANGE = (
    "null", "[]", "{}", "true", "-1", "0", "2", "1e30", "1e400", "NaN", "1" + "0" * 4999,
    "1" + "0" * 4200, "1000000000000", '""', '"' + "x" * 10_000 + '"', r'"\ud800"', r'"\u0000"',
    '"../victim"', '"/victim"', "[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500,
    "[[1, 2]]", '["a"]',
)  # fmt: skip
PLACE = "@@here@@"
SECONDS = 30


def changes(value, path=()):
    """Paths to every value and subtree; of long lists and tables, to their first and last one."""
    yield path
    children = list(value.items()) if isinstance(value, dict) else []
    children = list(enumerate(value)) if isinstance(value, list) else children
    is_table = len(children) > 2 and (isinstance(value, list) or len(children) > 60)
    for key, child in [children[0], children[-1]] if is_table else children:
        yield from changes(child, (*path, key))


def changed(values, path, strange):
    """The text of `values` with `strange` at a path; None drops the key, "twice" repeats it."""
    values = {"": json.loads(json.dumps(values))}
    at, key = values, ""
    for step in path:
        at, key = at[key], step
    if strange == "drop":
        del at[key]
    elif strange == "add":
        at[key] = {"surprise": 1} | at[key] if isinstance(at[key], dict) else [at[key]]
    elif strange == "twice" and isinstance(at, dict):
        at[PLACE] = 0
    else:
        at[key] = PLACE
    text = json.dumps(values.get("", {}))
    if strange == "twice":
        return text.replace(f'"{PLACE}": 0', f"{json.dumps(key)}: null")
    return text.replace(json.dumps(PLACE), strange)


def sealed(text):
    """The text with the checksum that its content has, where Python can read it."""
    try:
        values = json.loads(text)
        values.pop("sha256")
        return json.dumps(add_checksum(values))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return text


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with `data`, `model` (a run, evaluated and reported), `exported` and `scores`."""
    root = tmp_path_factory.mktemp("original")
    data_dir, model_dir = make_everything(str(root), documents=150)
    run_report(root)
    export.run(ExportConfig(model_dir, data_dir, export_dir=str(root / "exported")))
    rows = [{"text": f"some words {i}"} for i in range(12)] + [{"text": 3}]
    write_rows(root / "rows.jsonl", rows)
    run_score(root)
    index = root / "indexed"
    shutil.copytree(root / "exported", index, ignore=shutil.ignore_patterns("saved_model"))
    tensors = load_file(index / "model.safetensors")
    os.remove(index / "model.safetensors")
    save_file(tensors, index / "a.safetensors")
    weights = dict.fromkeys(tensors, "a.safetensors")
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (root / "saved").mkdir()
    (root / "saved" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": None})
    )
    shutil.copy(root / "rows.jsonl", root / "saved" / "data.arrow")
    work_dir = root / "data" / ".prepare"
    work_dir.mkdir()
    moving = {"splits": ["more"], "names": ["more-00000-of-00001.tfrecord", "more.texts"]}
    (work_dir / "moving.json").write_text(json.dumps(moving))
    (root / "weights.json").write_text('{"a": 2, "b": 0.5}')
    job = {
        **dict.fromkeys(("name", "group"), "bert"), "submission": "20240501t000000-a",
        "bucket": "bucket", "commands": [["train", "--x=1"]], "environment": "tpu",
        "accelerator": "v5e", "resource": "", "wheel": {"name": "a.whl", "bytes": 1, "sha256": ""},
        "requirements": {"name": "a.txt", "bytes": 1, "sha256": ""}, "max_restarts": 1,
        "max_seconds": 60,
    }  # fmt: skip
    (root / "job.json").write_text(json.dumps(job))
    cluster = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}}
    (root / "tf_config.json").write_text(json.dumps(cluster))
    return root


def run_score(root):
    score.run(
        ScoreConfig(
            input=(str(root / "rows.jsonl"),), model=str(root / "exported"),
            output_dir=str(root / "scores"), rows_per_part=7, max_rejected=1, progress="none",
        )
    )  # fmt: skip


def take_back(root):
    with open_work_folder(str(root / "data")):
        pass


def add_split(root):
    write_rows(root / "more.jsonl", ROWS)
    flags = {"split": "more", "max_seq_length": 64, "labels": None, "max_rejected": 9}
    prepare.run(config(root / "more.jsonl", root / "data", **flags))


def run_report(root):
    data_dir, model_dir = str(root / "data"), str(root / "model")
    report.run(ReportConfig(model_dir, data_dir))


def read_baseline(root):
    read_kept(str(root / "model" / "evaluation" / "baseline.json"), NUM_LABELS)


def read_calibration(root):
    flags = ExportConfig(str(root / "model"), str(root / "data"), export_dir="none")
    best = load_best(str(root / "model"))
    calibration = export._read_calibration(flags, best)
    export._fold(best.model, calibration["scale"], calibration["shift"])


def read_tokenizer(root):
    load_tokenizer(str(root / "data" / "tokenizer")).encode_windows(["some words"], 16, 0, 1)


def load_model(root):
    model = load_model_folder(str(root / "exported"))
    model.encode(["some words", ""])


def read_job(root):
    Job.from_json((root / "job.json").read_bytes())


def read_environment(root):
    environment = {"TF_CONFIG": (root / "tf_config.json").read_text()}
    assert isinstance(read_index(environment), int)
    read_cluster(environment)


# By file: what reads it, one after the other.
READERS = {
    "data/metadata.json": ((lambda root: load_metadata(str(root / "data"))), run_report, add_split),
    "data/.prepare/moving.json": (take_back,),
    "data/tokenizer/tokenizer_config.json": (read_tokenizer,),
    "data/tokenizer/tokenizer.json": (read_tokenizer,),
    "model/config.json": ((lambda root: load_best(str(root / "model"))), run_report),
    "model/best/step-7.json": (lambda root: load_best(str(root / "model")),),
    "model/evaluation/metrics.json": (run_report, read_calibration),
    "model/evaluation/curves.json": (run_report,),
    "model/evaluation/baseline.json": (read_baseline,),
    "model/evaluation/calibration.json": (read_calibration,),
    "exported/multihot.json": (load_model, run_score),
    "exported/config.json": (load_model,),
    "exported/tokenizer.json": (load_model,),
    "exported/tokenizer_config.json": (load_model,),
    "exported/saved_model.json": (lambda root: check_saved_model(str(root / "exported")),),
    "indexed/model.safetensors.index.json": (
        lambda root: load_pretrained(
            f"{root}/indexed", model_config(f"{root}/indexed", 3, "cls", 0.0, 0.0)
        ),
    ),
    "scores/plan.json": (run_score,),
    "scores/manifests/part-00000-of-00002.json": (run_score,),
    "saved/state.json": (lambda root: list_files((f"{root}/saved",), None, None, None),),
    "weights.json": (
        lambda root: positive_weights(f"{root}/weights.json", (3, 5), 9, 100.0, ("a", "b")),
    ),
    "job.json": (read_job,),
    "tf_config.json": (read_environment,),
}  # fmt: skip


class Stuck(BaseException):
    """A reader that does not end."""


@contextlib.contextmanager
def limited(what):
    def stop(*_):
        raise Stuck(what)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def read_all(name, root, text, shown):
    """Whether all readers of a changed file took it; asserts that they said why if not."""
    (root / name).write_text(text)
    for reader in READERS[name]:
        try:
            with limited(shown):
                reader(root)
        except (UserError, OSError) as error:
            assert "\n" not in str(error).strip(), shown
            return False
        except BaseException as error:
            raise AssertionError(f"{shown}: {type(error).__name__}: {error}") from error
    return True


def attack(name, original, tmp_path, choices, num_changes):
    """Changes a file in so many places; returns how many changes were refused and taken."""
    values = json.loads((original / name).read_text())
    places = list(changes(values))
    kinds = [*STRANGE, "drop", "twice", "add"]
    tries = [(place, kind) for place in places for kind in kinds]
    if num_changes is not None:
        tries = [((), STRANGE[-4]), *choices.sample(tries, min(num_changes, len(tries)))]
    counts = {"refused": 0, "taken": 0}
    root = tmp_path / "copy"
    top = name.split("/")[0]
    for place, kind in tries:
        if kind in ("drop", "twice") and not place:
            continue
        if not root.exists():
            shutil.copytree(original, root)
        text = sealed(changed(values, place, kind))
        is_taken = read_all(name, root, text, f"{name} {place} {kind[:40]}")
        counts["taken" if is_taken else "refused"] += 1
        # What a reader may have changed.
        for folder in {top, "data", "model", "scores"}:
            source, copy = original / folder, root / folder
            if source.is_dir():
                shutil.rmtree(copy)
                shutil.copytree(source, copy)
    return counts


@pytest.mark.parametrize("num_changes", [2, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", list(READERS))
def test_a_changed_file_is_refused_or_harmless(name, num_changes, original, tmp_path):
    seed = random.randrange(10**6)
    print("seed of the changes:", seed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    counts = attack(name, original, tmp_path, random.Random(seed), num_changes)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f"{name}: {counts} in {time.monotonic() - began:.0f} s, {grown / 2**20:.2f} GiB more")
    # A baseline that cannot be read is fitted again.
    assert counts["refused"] or name.endswith("baseline.json")
    assert grown < 2 * 2**20


@pytest.fixture
def copy(original, tmp_path):
    """A copy of the original, and a folder `victim` beside it."""
    root = tmp_path / "copy"
    shutil.copytree(original, root)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("somebody's")
    return root


def moving(root, names, splits=("more",)):
    values = {"splits": list(splits), "names": names}
    (root / "data" / ".prepare" / "moving.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name",
    ["../../victim", "../../victim/file", "/victim", "..", ".", "", "metadata.json", "rows.jsonl",
     "tokenizer/../../../victim", "more-00000-of-00001.tfrecord/../../../victim", "a\0b"],
)  # fmt: skip
def test_no_file_is_removed_that_prepare_does_not_write(copy, name):
    if name == "/victim":
        name = str(copy.parent / "victim")
    moving(copy, ["more.texts", name])
    (copy / "data" / "more.texts").write_text("")
    before = read_tree(copy.parent)
    with pytest.raises(UserError, match=r"moving.json: damaged .*names.1 is"):
        take_back(copy)
    assert read_tree(copy.parent) == before


def test_a_finished_split_is_not_taken_back(copy):
    before = read_tree(copy / "data")
    moving(copy, ["tokenizer", "train-00000-of-00002.tfrecord", "test.texts"])
    take_back(copy)
    after = read_tree(copy / "data")
    assert after == {name: before[name] for name in before if not name.startswith(".prepare")}


def test_links_are_removed_and_not_what_they_lead_to(copy):
    victim, data = copy.parent / "victim", copy / "data"
    (data / "more.texts").symlink_to(victim, target_is_directory=True)
    (data / "more-00000-of-00001.tfrecord").symlink_to(victim / "file")
    (data / ".prepare" / "old").symlink_to(victim, target_is_directory=True)
    take_back(copy)
    assert not (data / "more.texts").exists() and not (data / ".prepare").exists()
    for name in (".prepare", "rejected"):
        (data / name).symlink_to(victim, target_is_directory=True)
        with pytest.raises(UserError, match=f"data/{name}: a link"):
            take_back(copy)
        (data / name).unlink()
    shutil.rmtree(copy / "scores" / "manifests")
    (copy / "scores" / "manifests").symlink_to(victim, target_is_directory=True)
    with pytest.raises(UserError, match="manifests: a link"):
        run_score(copy)
    assert read_tree(victim) == {"file": b"somebody's"}


def test_no_file_is_written_through_a_link(copy):
    victim = copy.parent / "victim"
    (copy / "data" / "metadata.json.tmp").symlink_to(victim / "file")
    with pytest.raises(OSError, match=r"symbolic links"):
        load_metadata(str(copy / "data")).save(str(copy / "data"))
    shutil.rmtree(copy / "scores")
    (copy / "scores").mkdir()
    (copy / "scores" / "plan.json.tmp").symlink_to(victim / "file")
    with pytest.raises(OSError, match=r"symbolic links"):
        run_score(copy)
    assert read_tree(victim) == {"file": b"somebody's"}


@pytest.mark.parametrize("name", ["best", "checkpoints", "tensorboard", "evaluation"])
def test_a_run_does_not_write_where_a_link_leads(copy, name):
    victim, data_dir, model_dir = copy.parent / "victim", str(copy / "data"), copy / "model"
    shutil.rmtree(model_dir / name, ignore_errors=True)
    (model_dir / name).symlink_to(victim, target_is_directory=True)
    (victim / "step-9.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{model_dir / name}: a link, and no folder; remove it$"):
        if name == "evaluation":
            evaluate.run(EvaluateConfig(str(model_dir), data_dir, resamples=2))
        train.run(TrainConfig(data_dir=data_dir, model_dir=str(model_dir)))
    assert read_tree(victim) == {"file": b"somebody's", "step-9.json": b"{}"}
    assert not (model_dir / OWNER_FILE).exists()


def test_a_link_among_checkpoints_is_not_followed(copy):
    victim = copy.parent / "victim"
    best = CheckpointFolder(str(copy / "model" / "best"))
    for name in ("step-7_temp", "step-7-again_temp"):
        (copy / "model" / "best" / name).symlink_to(victim, target_is_directory=True)
    best.remove_unfinished()
    assert read_tree(victim) == {"file": b"somebody's"}
    assert best.find(7) and not (copy / "model" / "best" / "step-7_temp").is_symlink()


@pytest.mark.parametrize(
    "path",
    ["data/metadata.json", "data/.prepare/moving.json", "data/tokenizer/tokenizer.json",
     "model/config.json", "model/best/step-7.json", "model/evaluation/metrics.json",
     "model/evaluation/calibration.json", "exported/multihot.json", "exported/config.json",
     "exported/tokenizer_config.json", "exported/model.safetensors", "exported/saved_model.json",
     "indexed/a.safetensors", "scores/plan.json", "saved/state.json"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_plain_files_are_opened(copy, path, kind):
    name = "indexed/model.safetensors.index.json" if path == "indexed/a.safetensors" else path
    name = "exported/config.json" if path == "exported/model.safetensors" else name
    (copy / path).unlink()
    if kind == "pipe":
        os.mkfifo(copy / path)
    elif kind == "folder":
        (copy / path).mkdir()
    else:
        (copy / path).symlink_to("/dev/zero")
    with limited(path), pytest.raises((UserError, OSError), match=Path(path).name):
        READERS[name][-1](copy)


def set_value(path, *keys, value):
    values = json.loads(path.read_text())
    at = values
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(sealed(json.dumps(values)))


@pytest.mark.parametrize("value", [10**9, 10**12])
@pytest.mark.parametrize(
    ("path", "keys"),
    [
        *(("exported/config.json", (name,)) for name in (
            "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size",
            "max_position_embeddings", "type_vocab_size", "num_attention_heads")),
        *(("exported/multihot.json", (name,)) for name in ("max_seq_length", "max_windows")),
        *(("exported/multihot.json", ("packing", name)) for name in (
            "max_documents", "max_windows")),
        ("exported/multihot.json", ("packing", "row_groups", 0, 0)),
        ("exported/multihot.json", ("packing", "row_groups", 0, 1)),
        *(("model/config.json", ("model", name)) for name in (
            "num_layers", "vocab_size", "hidden_size", "intermediate_size", "num_labels",
            "max_position_embeddings")),
        ("model/config.json", ("packing", "row_groups", 0, 0)),
        *(("data/metadata.json", (name,)) for name in (
            "max_seq_length", "max_windows", "vocab_size")),
        ("scores/plan.json", ("packing", "row_groups", 0, 0)),
        ("scores/plan.json", ("packing", "max_windows")),
    ],
)  # fmt: skip
def test_sizes_are_bounded_before_anything_is_allocated(copy, path, keys, value):
    set_value(copy / path, *keys, value=value)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with limited(path), pytest.raises(UserError):
        for reader in READERS[path]:
            reader(copy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20


@pytest.mark.parametrize("path", ["data/metadata.json", "exported/multihot.json"])
def test_two_labels_of_one_name_are_refused(copy, path):
    labels = json.loads((copy / path).read_text())["labels"]
    set_value(copy / path, "labels", value=[labels[1], *labels[1:]])
    with pytest.raises(UserError, match=rf"{path}: damaged \(.*label"):
        READERS[path][0](copy)
