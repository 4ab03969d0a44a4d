"""What may stand behind `--` of `submit`."""

import pytest

from launch.submit import parse_commands
from trainer.errors import UserError

TRAIN = ["train", "--data_dir=gs://b/d", "--model_dir=gs://b/m"]
SAMPLE = ["sample", "--output=s.jsonl"]
PREPARE = ["prepare", "--input=s.jsonl", "--data_dir=gs://b/d"]
EXPORT = ["export", "--model_dir=gs://b/m", "--export_dir=gs://b/e"]


def test_a_chain_is_split_at_each_dash_dash():
    assert parse_commands([*SAMPLE, "--", *PREPARE, "--", *TRAIN, "--", *EXPORT]) == tuple(
        map(tuple, (SAMPLE, PREPARE, TRAIN, EXPORT))
    )


def test_what_is_no_file_may_be_named():
    command = ["prepare", "--input=sample:docstrings:100,tfds:a/b", "--data_dir=gs://b/d"]
    assert parse_commands(command) == (tuple(command),)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected a command behind `--`"),
        ([*TRAIN, "--"], "expected a command behind `--`"),
        (["trian"], "-- trian: no command that can be submitted; did you mean train?"),
        (["submit"], "-- submit: no command that can be submitted"),
        (["train", "--data_dir=gs://b/d"], "-- train: --model_dir is required"),
        ([*TRAIN, "--warmup=2"], "-- train: --warmup=2"),
        (
            ["train", "--data_dir=d", "--model_dir=gs://b/m"],
            "-- train --data_dir=d: lies on this machine",
        ),
        (
            ["train", "--data_dir=gs://b/d", "--model_dir=m"],
            "-- train --model_dir=m: checkpoints have to outlive the machine",
        ),
        (SAMPLE, "-- sample --output=s.jsonl: would be lost with the machine"),
        (PREPARE, "-- prepare --input=s.jsonl: lies on this machine"),
        (
            ["export", "--model_dir=gs://b/m", "--export_dir=e"],
            "-- export --export_dir=e: would be lost with the machine",
        ),
    ],
)
def test_what_cannot_run_elsewhere_is_refused_here(arguments, expected):
    with pytest.raises(UserError) as caught:
        parse_commands(arguments)
    assert expected in str(caught.value)
