"""SIGKILL at random moments, from a run's start to its end: the files of an uninterrupted run."""

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
from killing import read_tree, run_and_kill, run_to_the_end, stages


@pytest.fixture(scope="module")
def shards(documents, tmp_path_factory) -> Path:
    """20 files of 50 documents each."""
    folder = tmp_path_factory.mktemp("shards")
    lines = Path(documents).read_text(encoding="utf-8").splitlines(keepends=True)
    for index in range(20):
        name = folder / f"shard-{index:02d}.jsonl"
        name.write_text("".join(lines[50 * index : 50 * index + 50]), encoding="utf-8")
    return folder


def check_ids(output, shards):
    expected = [json.loads(line)["id"] for path in sorted(shards.iterdir()) for line in path.open()]
    found = [
        json.loads(line)["id"] for path in sorted(output.glob("part-*")) for line in gzip.open(path)
    ]
    assert found == expected


def kill_score(model, shards, folder, max_workers, num_kills, seed, more=("--precision=float32",)):
    """Rounds of runs that are killed, until so many kills; of each round the files are compared.

    Returns:
      Kills, rounds, and the kills that came before the first manifest, while parts were written,
      and after the last.
    """
    draw = random.Random(seed)
    moments = {"before": 0, "during": 0, "after": 0}
    kills = rounds = 0
    with stages("score", max_workers, folder) as actors:

        def flags(output, worker, num_workers):
            return [
                f"--model={model}", f"--input={shards}", f"--output_dir={output}",
                "--rows_per_part=50", f"--worker_index={worker}", f"--num_workers={num_workers}",
                *more,
            ]  # fmt: skip

        whole = folder / "whole"
        first = run_to_the_end(actors[0], flags(folder / "first", 0, 1))
        # The first run finds less in the disk's cache than those that follow.
        life = min(first, run_to_the_end(actors[0], flags(whole, 0, 1)))
        expected = read_tree(whole)
        check_ids(whole, shards)
        while kills < num_kills:
            output = folder / f"out-{rounds}"
            rounds += 1
            for _ in range(num_kills):
                num_workers = draw.randint(1, max_workers)
                runs = [
                    (actors[i], flags(output, i, num_workers), draw.uniform(0, 1.1 * life))
                    for i in range(num_workers)
                ]
                codes = run_and_kill(runs)
                assert set(codes) <= {0, -9}, [actor.errors for actor in actors]
                done = len(list(output.glob("manifests/*.json")))
                moments["after" if done == 20 else "during" if done else "before"] += codes.count(
                    -9
                )
                kills += codes.count(-9)
                if (output / "_SUCCESS").exists() or kills >= num_kills:
                    break
            run_to_the_end(actors[0], flags(output, 0, 1))
            assert read_tree(output) == expected
            check_ids(output, shards)
            shutil.rmtree(output)
        assert list((folder / "tmp").iterdir()) == []
    print(f"{kills} kills in {rounds} rounds, seed {seed}: {moments}, a run of {life:.1f} s")
    return kills, moments


@pytest.mark.parametrize("max_workers", [1, 2])
def test_five_kills_of_score(model, shards, tmp_path, max_workers):
    kills, _ = kill_score(model, shards, tmp_path, max_workers, num_kills=5, seed=1)
    assert kills >= 5


@pytest.mark.long
@pytest.mark.parametrize("max_workers", [1, 2])
def test_a_hundred_kills_of_score(model, shards, tmp_path, max_workers):
    kills, moments = kill_score(model, shards, tmp_path, max_workers, num_kills=100, seed=2)
    assert kills >= 100 and min(moments["before"], moments["during"]) >= 10


INT8 = ("--precision=int8", "--force")


def test_five_kills_of_score_in_int8(narrow_model, shards, tmp_path):
    kills, _ = kill_score(narrow_model, shards, tmp_path, 1, num_kills=5, seed=3, more=INT8)
    assert kills >= 5


@pytest.mark.long
def test_a_hundred_kills_of_score_in_int8(narrow_model, shards, tmp_path):
    kills, moments = kill_score(narrow_model, shards, tmp_path, 2, num_kills=100, seed=4, more=INT8)
    assert kills >= 100 and min(moments["before"], moments["during"]) >= 10


def kill_prepare(documents, folder, num_kills, seed):
    """The same for `prepare`: two calls, the second of which adds a split."""
    draw = random.Random(seed)
    first, second = folder / "first.jsonl", folder / "second.jsonl"
    lines = Path(documents).read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[:800]), encoding="utf-8")
    second.write_text("".join([*lines[800:], '{"text": 3, "labels": []}\n']), encoding="utf-8")
    kills = rounds = 0
    with stages("prepare", 1, folder) as (actor,):

        def calls(data_dir):
            shared = [f"--data_dir={data_dir}", "--vocab_size=300", "--max_rejected=5"]
            return (
                [f"--input={first}", "--split=train:0.8,test:0.2", "--num_shards=3", *shared],
                [f"--input={second}", "--split=more", "--num_shards=2", *shared],
            )

        whole = folder / "whole"
        lives = [run_to_the_end(actor, call) for call in calls(whole)]
        expected = read_tree(whole)
        assert "rejected/more.jsonl" in expected and len(expected) > 12
        while kills < num_kills:
            data_dir = folder / f"data-{rounds}"
            rounds += 1
            for call, life in zip(calls(data_dir), lives, strict=True):
                for _ in range(3):
                    codes = run_and_kill([(actor, call, draw.uniform(0, 1.1 * life))])
                    assert set(codes) <= {0, -9}, actor.errors
                    kills += codes.count(-9)
                run_to_the_end(actor, call)
            assert read_tree(data_dir) == expected
            shutil.rmtree(data_dir)
        assert list((folder / "tmp").iterdir()) == []
    print(f"{kills} kills in {rounds} rounds, seed {seed}, runs of {lives} s")
    return kills


def test_five_kills_of_prepare(documents, tmp_path):
    assert kill_prepare(documents, tmp_path, num_kills=5, seed=3) >= 5


@pytest.mark.long
def test_a_hundred_kills_of_prepare(documents, tmp_path):
    assert kill_prepare(documents, tmp_path, num_kills=100, seed=4) >= 100
