"""Folders in Cloud Storage: TensorFlow's own gs:// against a fake that fails on demand.

Everything that uses gs:// runs in a child process, because TensorFlow reads its surroundings once.
"""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from fake_gcs import FakeStorage, random_faults, serve

from trainer import prepare
from trainer.config import PrepareConfig
from trainer.data.metadata import load_metadata
from trainer.errors import RunAgain
from trainer.storage import filesystem
from trainer.training.checkpoint import load_best
from trainer.training.checkpoint_folder import CheckpointFolder

FOLDER = os.path.dirname(os.path.abspath(__file__))
WORDS = "market price rise fall rain wind sun storm goal match team player vote law court".split()
TOPICS = ("money", "weather", "sport", "state")
TRAIN = (
    "train", "--hidden_size=32", "--num_layers=1", "--num_attention_heads=2",
    "--intermediate_size=64", "--tokens_per_replica=256", "--wide=none", "--jit_compile=false",
    "--num_train_epochs=2", "--checkpoint_every=9", "--learning_rate=3e-3", "--strategy=cpu",
)  # fmt: skip
TIMES = ("seconds", "documents_per_second", "tokens_per_second")

# Runs commands one after the other; prints [[exit code, standard error], ...].
COMMANDS = """
import contextlib, io, json, sys
from trainer.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    results.append([code, errors.getvalue()])
print(json.dumps(results))
"""


def environment(*parts):
    values = dict(os.environ) | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    for part in parts:
        values |= part
    return values


def run_commands(env, *commands):
    child = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def run_alone(env, command):
    """In a process of its own, which exit code 75 ends at once."""
    child = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *command],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return [child.returncode, child.stderr]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """240 documents of four topics in two shards a split."""
    folder = tmp_path_factory.mktemp("small")
    draw = random.Random(5)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(240):
            topics = draw.sample(range(4), draw.choice((1, 1, 2)))
            words = [w for topic in topics for w in WORDS[topic * 4 : topic * 4 + 4] * 2]
            draw.shuffle(words)
            labels = [TOPICS[topic] for topic in topics]
            file.write(json.dumps({"text": " ".join(words), "labels": labels}) + "\n")
    prepare.run(
        PrepareConfig(
            input=(str(folder / "rows.jsonl"),), data_dir=str(folder / "data"), vocab_size=200,
            max_seq_length=32, num_shards=2,
        )
    )  # fmt: skip
    return str(folder / "data")


@pytest.fixture(scope="module")
def local_run(data_dir, tmp_path_factory):
    """The model folder of a run on local folders, trained and evaluated."""
    model_dir = str(tmp_path_factory.mktemp("local") / "run")
    folders = [f"--data_dir={data_dir}", f"--model_dir={model_dir}"]
    commands = [*TRAIN, *folders], ["evaluate", *folders], ["report", *folders]
    results = run_commands(environment(), *commands)
    assert [code for code, _ in results] == [0, 0, 0], results
    return model_dir


@contextlib.contextmanager
def fake(tmp_path, **settings):
    """A bucket named b, and what its faults were."""
    (tmp_path / "certificates").mkdir()
    cloud = FakeStorage({"b": {}}, **settings)
    with serve(cloud, str(tmp_path / "certificates")) as env:
        yield cloud, environment(env)


def try_everything(root):
    """What every function of `trainer.storage.filesystem` says of a folder, local or not."""
    from trainer.storage.filesystem import write_atomically

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except FileNotFoundError:
            return "not found"

    contents = {"text": "å line\n".encode(), "none": b"", "large": bytes(range(256)) * 4000}
    names = {name: os.path.join(root, "deep", "folder", name) for name in contents}
    folder = os.path.join(root, "deep", "folder")
    found = [filesystem.exists(folder), attempt(filesystem.list_folder, folder)]
    filesystem.make_folder(folder)
    for name, path in names.items():
        write_atomically(path, b"of another length, and replaced")
        write_atomically(path, contents[name])
    for index in range(8):
        write_atomically(os.path.join(folder, f"part-{index}"), str(index))
    found += [
        filesystem.exists(folder),
        filesystem.list_folder(folder),
        filesystem.list_folder(root),
    ]
    found += [filesystem.read_bytes(path) == contents[name] for name, path in names.items()]
    found += [filesystem.sizes([*names.values(), os.path.join(folder, "missing")])]
    found += [filesystem.read_text(names["text"]), filesystem.exists(names["none"])]
    found += [attempt(filesystem.read_bytes, os.path.join(folder, "missing"))]
    with filesystem.local_copy(folder) as copy:
        found += [{name: os.path.getsize(os.path.join(copy, name)) for name in os.listdir(copy)}]
    for inner in ("kept", "left"):
        filesystem.make_folder(os.path.join(folder, inner))
        write_atomically(os.path.join(folder, inner, "file"), inner)
    with filesystem.local_copy(folder, ("kept", "missing")) as copy:
        found += [filesystem.read_text(os.path.join(copy, "kept", "file"))]
        found += [filesystem.exists(os.path.join(copy, name)) for name in ("text", "missing")]
        # A copy leaves out what nobody asked for; a local folder is itself.
        is_left_out = not os.path.exists(os.path.join(copy, "left"))
        assert is_left_out == filesystem.is_remote(root)
    return json.loads(json.dumps(found))


def test_local_folders_and_a_failing_store_answer_alike(tmp_path):
    expected = try_everything(str(tmp_path / "local"))
    assert expected[:3] == [False, "not found", True]
    assert expected[3] == ["large", "none", *(f"part-{i}" for i in range(8)), "text"]
    draw, interrupted = random_faults(3, 0.1), set()

    def plan(request):
        """Random faults, and every list interrupted once at its second page."""
        if "pageToken" in request and request not in interrupted:
            interrupted.add(request)
            return "reset before"
        return draw(request)

    with fake(tmp_path, plan=plan) as (cloud, env):
        child = subprocess.run(
            [
                sys.executable, "-c",
                "import json; from test_storage import try_everything; "
                "print(json.dumps(try_everything('gs://b/root')))",
            ],
            env=env | {"PYTHONPATH": os.pathsep.join((FOLDER, os.path.dirname(FOLDER)))},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == expected
    assert interrupted and sum(cloud.faults.values()) >= 5, cloud.faults


def rows_of(model_dir):
    with open(os.path.join(model_dir, "metrics.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def tensors_of(model_dir):
    folder = CheckpointFolder(os.path.join(model_dir, "checkpoints"))
    reader = tf.train.load_checkpoint(folder.find(folder.steps()[-1]))
    names = [n for n in reader.get_variable_to_shape_map() if n.endswith("VARIABLE_VALUE")]
    return {name: reader.get_tensor(name) for name in names}


def test_a_run_in_a_failing_store_killed_and_resumed_equals_the_local_one(
    data_dir, local_run, tmp_path
):
    found = str(tmp_path / "found")
    folders = ["--data_dir=gs://b/data", "--model_dir=gs://b/some/run"]
    with fake(tmp_path, plan=random_faults(11, 0.05)) as (cloud, env):
        cloud.put_folder("b", "data", data_dir)
        first = subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", *TRAIN, *folders],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while first.poll() is None and "some/run/checkpoints/step-9.json" not in cloud.buckets["b"]:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL, first.stderr.read()
        before = {name for name in cloud.buckets["b"] if "/checkpoints/" in name}
        commands = [*TRAIN, *folders], ["evaluate", *folders], ["report", *folders]
        results = run_commands(env, *commands)
        assert [code for code, _ in results] == [0, 0, 0], results
        cloud.get_folder("b", "some/run", found)
    assert sum(cloud.faults.values()) >= 10 and set(cloud.faults) >= {"429", "503"}, cloud.faults
    expected = tensors_of(local_run)
    tensors = tensors_of(found)
    assert len(before) >= 3 and len(expected) > 60 and set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    assert load_best(found).fingerprint == load_best(local_run).fingerprint
    assert rows_of(found) == rows_of(local_run)
    reports = []
    for model_dir in (found, local_run):
        with open(os.path.join(model_dir, "evaluation", "metrics.json"), encoding="utf-8") as file:
            reports.append(json.load(file))
    assert reports[0] == reports[1]
    tables = []
    for model_dir in (found, local_run):
        with open(os.path.join(model_dir, "report.html"), encoding="utf-8") as file:
            tables.append(re.findall(r"<table.*?</table>", file.read(), re.DOTALL))
    assert len(tables[0]) >= 5 and tables[0] == tables[1]
    boards = os.listdir(os.path.join(found, "tensorboard"))
    assert len(boards) == 2 and not [name for name in os.listdir(found) if name.endswith(".tmp")]


def test_what_a_store_refuses_is_said_in_one_line(data_dir, tmp_path):
    statuses = {"forbidden": 403, "down": 503, "busy": 429}
    with fake(tmp_path, statuses=statuses) as (cloud, env):
        cloud.put_folder("b", "data", data_dir)
        cloud.put_folder("b", "damaged", data_dir)
        shard = load_metadata(data_dir).splits["train"].shards[1].name
        content = bytearray(cloud.buckets["b"][f"damaged/{shard}"].data)
        content[len(content) // 2] ^= 16
        cloud.put("b", f"damaged/{shard}", bytes(content))
        commands = [
            [*TRAIN, f"--data_dir=gs://{data}", f"--model_dir={model}"]
            for data, model in (
                ("missing/data", "gs://b/run"),
                ("forbidden/data", "gs://b/run"),
                ("b/data", "gs://forbidden/run"),
                ("b/data", "gs://missing/run"),
                ("b/damaged", str(tmp_path / "run")),
                ("down/data", "gs://b/run"),
                ("b/data", "gs://busy/run"),
            )
        ]
        env |= {"GCS_RETRY_CONFIG_MAX_RETRIES": "2"}
        results = run_commands(env, *commands[:-2])
        results += [run_alone(env, command) for command in commands[-2:]]
    expected = [
        (2, "gs://missing/data: no metadata.json"),
        (2, "gs://forbidden/data/metadata.json: access denied (http 403)"),
        (2, "gs://forbidden/run/config.json: access denied (http 403)"),
        (2, "gs://missing/run/multihot-owner.txt: not found; check bucket "),
        (2, f"gs://b/damaged/{shard}: its CRC-32C differs"),
        (75, "gs://down/data/metadata.json: the store did not answer (HTTP 503)"),
        (75, "gs://busy/run/config.json: the store did not answer (HTTP 429)"),
    ]
    for (code, errors), (expected_code, start) in zip(results, expected, strict=True):
        bar, _, line = errors.rpartition("multihot train: error: ")
        assert (code, line[: len(start)]) == (expected_code, start)
        assert line.count("\n") == 1 and "Traceback" not in bar
        # Only this one has come as far as training.
        assert not bar or "damaged" in start


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("HTTP response code 401 with body 'x' when reading gs://b/a", PermissionError, "401"),
        ("HTTP response code 404 with body 'x' when reading gs://b/a", FileNotFoundError, "found"),
        ("HTTP response code 412 with body 'x' when reading gs://b/a", OSError, "HTTP 412"),
        ("HTTP response code 408 with body 'x' when reading gs://b/a", RunAgain, "HTTP 408"),
        ("libcurl code 6 meaning 'Couldn't resolve', error details: x", RunAgain, "resolve"),
    ],
)
def test_errors_of_a_store_say_whether_to_mend_or_to_run_again(text, kind, message):
    error = filesystem.explain(
        tf.errors.AbortedError(None, None, f"Error executing an HTTP request: {text}")
    )
    assert type(error) is kind and message in str(error)
    assert filesystem.explain(tf.errors.AbortedError(None, None, "a lost worker")) is None


def test_the_fake_keeps_preconditions_and_composes(tmp_path):
    """What TensorFlow does not ask for, over plain HTTP."""
    with fake(tmp_path) as (cloud, env):
        connection = http.client.HTTPConnection(env["HTTPS_PROXY"].removeprefix("http://"))

        def ask(method, path, body=b"", **headers):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

        generation = cloud.put("b", "one", b"1").generation
        cloud.put("b", "two", b"22")
        begin = "/upload/storage/v1/b/b/o?uploadType=resumable&name=one&ifGenerationMatch="
        assert ask("POST", f"{begin}0")[0] == 412
        assert ask("POST", f"{begin}{generation}")[0] == 200
        parts = json.dumps({"sourceObjects": [{"name": "two"}, {"name": "one"}]})
        assert ask("POST", "/storage/v1/b/b/o/all/compose", parts)[0] == 200
        assert ask("GET", "/b/all") == (200, b"221")
        assert ask("GET", "/b/all", Range="bytes=1-9") == (206, b"21")
