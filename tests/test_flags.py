"""Flags and configs: the same fields, the same defaults, JSON both ways, one line on a mistake."""

import dataclasses
import json
import math

import pytest

from trainer import config
from trainer.cli import COMMANDS, config_of
from trainer.errors import UserError
from trainer.flags import Option, define_flags, describe_flags, option_fields, parse_flags
from trainer.model_config import OptimizerConfig, PackingConfig
from trainer.run_config import ExportConfig, TrainConfig
from trainer.storage.own_files import parse

SUBMIT = {"project": "my-project", "bucket": "jobs-of-mine", "name": "first"}
# The flags that each command cannot do without.
REQUIRED = {
    "sample": {"output": "out.jsonl"},
    "prepare": {"input": ("a.jsonl", "b.csv"), "data_dir": "data"},
    "train": {"data_dir": "data", "model_dir": "run"},
    "evaluate": {"data_dir": "data", "model_dir": "run"},
    "report": {"model_dir": "run"},
    "export": {"model_dir": "run", "export_dir": "model"},
    "score": {"model": "model", "input": ("a.jsonl",), "output_dir": "scores"},
    "preflight": {"target": "v5e:4x4"},
    "submit tpu": SUBMIT | {"zone": "us-central1-a", "accelerator": "v5e:2x2"},
    "submit vertex": SUBMIT | {"region": "us-central1", "accelerator": "l4:2"},
    "submit dataflow": SUBMIT | {"region": "us-central1"},
    "submit check": {"project": "my-project", "bucket": "jobs-of-mine"},
    "jobs list": {"project": "my-project"},
    "jobs status": {"project": "my-project", "name": "first"},
    "jobs logs": {"name": "first"},
    "jobs cancel": {"project": "my-project"},
}
# Flags of which a command needs one or another.
ALTERNATIVES = {
    "jobs list": {"zone": "us-central1-a"},
    "jobs status": {"region": "us-central1"},
    "jobs logs": {"bucket": "jobs-of-mine"},
    "jobs cancel": {"name": "first", "zone": "us-central1-a"},
}


def required(command: str) -> dict:
    return REQUIRED[command] | ALTERNATIVES.get(command, {})


def through_json(values) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(values)))


def from_json(kind, values):
    return parse(kind, json.dumps(values), "config.json", "restore it")


def required_arguments(command: str) -> list[str]:
    return [
        f"--{name}={','.join(value) if isinstance(value, tuple) else value}"
        for name, value in required(command).items()
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_help_and_the_config_s_default(command):
    kind = config_of(command)
    fields = list(option_fields(kind))
    help_text = describe_flags(kind)
    values = define_flags(kind)
    assert sorted(values) == sorted(item.name for item in fields)
    for item in fields:
        assert len(item.metadata["option"].help) >= 10, f"--{item.name} explains nothing"
        assert f"--{item.name}=" in help_text or f"--[no]{item.name}" in help_text
        default = values[item.name].value
        assert (tuple(default) if isinstance(default, list) else default) == item.default
    assert max(map(len, help_text.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_required_flags_alone_give_the_defaults(command):
    assert parse_flags(config_of(command), required_arguments(command)) == config_of(command)(
        **required(command)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_each_missing_required_flag_is_named(command):
    for missing in REQUIRED[command]:
        arguments = [
            argument
            for argument in required_arguments(command)
            if not argument.startswith(f"--{missing}=")
        ]
        with pytest.raises(UserError, match=f"--{missing} is required"):
            parse_flags(config_of(command), arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_round_trip(command):
    original = config_of(command)(**required(command))
    assert from_json(config_of(command), through_json(original)) == original


def test_json_round_trip_of_changed_and_nested_fields():
    original = TrainConfig(
        data_dir="data",
        model_dir="run",
        row_groups="4x128,2x64",
        evaluate_every=0.5,
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine"),
    )
    values = through_json(original)
    assert values["optimizer"]["learning_rate"] == 3e-4
    assert from_json(TrainConfig, values) == original
    packing = PackingConfig(row_groups=((4, 128), (2, 64)), max_documents=9, max_windows=9)
    assert from_json(PackingConfig, through_json(packing)) == packing
    values["from_the_future"] = 1
    with pytest.raises(UserError, match="from_the_future"):
        from_json(TrainConfig, values)


def test_values_of_every_type_arrive_in_the_config():
    arguments = ["--hidden_size", "128", "--num_attention_heads=2", "--num_train_epochs=0.5"]
    arguments += ["--learning_rate=3e-4", "--head=mean", "--init_checkpoint=bert", "--patience=2"]
    parsed = parse_flags(TrainConfig, required_arguments("train") + arguments)
    assert parsed == TrainConfig(
        data_dir="data",
        model_dir="run",
        hidden_size=128,
        num_attention_heads=2,
        num_train_epochs=0.5,
        head="mean",
        init_checkpoint="bert",
        patience=2,
        optimizer=OptimizerConfig(learning_rate=3e-4),
    )
    exported = parse_flags(ExportConfig, [*required_arguments("export"), "--uncalibrated"])
    assert exported.uncalibrated is True
    columns = parse_flags(
        config.PrepareConfig, [*required_arguments("prepare"), "--label_field=red,green"]
    )
    assert columns.label_field == ("red", "green")


def test_parsing_twice_keeps_nothing_of_the_first():
    arguments = required_arguments("train")
    assert parse_flags(TrainConfig, [*arguments, "--patience=2"]).patience == 2
    assert parse_flags(TrainConfig, arguments).patience == 0


@pytest.mark.parametrize(
    ("command", "argument", "expected"),
    [
        ("sample", "--num_documents=0", "--num_documents=0: expected a positive number"),
        ("sample", "--num_documents=many", "--num_documents=many: expected an integer"),
        ("prepare", "--vocab_size=100", "--vocab_size=100: expected at least 128"),
        ("prepare", "--max_seq_length=2", "--max_seq_length=2: expected at least 8"),
        ("prepare", "--split=train:0.8,test:0.3", "shares that sum to 1"),
        ("prepare", "--split=train:x", "'train:x' is not NAME:SHARE"),
        ("prepare", "--max_rejected=-1", "--max_rejected=-1"),
        ("prepare", "--num_shards=0", "--num_shards=0: expected at least 1"),
        ("train", "--hidden_size=250.5", "--hidden_size=250.5: expected an integer"),
        ("train", "--hidden_size=250", "a multiple of --num_attention_heads=4"),
        ("train", "--learning_rate=0", "--learning_rate=0.0: expected a positive rate"),
        ("train", "--learning_rate=nan", "--learning_rate=nan: expected a finite number"),
        ("train", "--learning_rate=inf", "--learning_rate=inf: expected a finite number"),
        ("train", "--warmup=1.5", "--warmup=1.5"),
        ("train", "--head=tail", "expected one of auto, cls, mean, label_attention"),
        ("train", "--precision=float64", "--precision=float64: expected one of auto"),
        ("train", "--row_groups=8by128", "expected ROWSxLENGTH"),
        ("train", "--hidden_dropout=1", "--hidden_dropout=1.0: expected a rate in [0, 1)"),
        ("train", "--hiden_size=8", "--hiden_size: no such flag; did you mean --hidden_size?"),
        ("train", "--zebra=8", "--zebra: no such flag; --help lists them"),
        ("train", "--seed", "Missing value for flag --seed"),
        ("train", "stray", "'stray': expected only --flag=value"),
        ("evaluate", "--min_support=0", "--min_support=0: expected at least 1"),
        ("export", "--uncalibrated=perhaps", "--uncalibrated=perhaps: expected true or false"),
        ("score", "--scores=top:inf", "--scores=top:inf: expected all, chosen, top:K or"),
        ("score", "--tokens_per_batch=1000000000", "expected 8 to 2^24 tokens"),
        ("score", "--keep_columns=caf\udce9", "--keep_columns='caf\\udce9': expected UTF-8"),
        ("score", "--scores=top:0", "--scores=top:0: expected all, chosen, top:K or above:P"),
        ("score", "--scores=above:2", "--scores=above:2"),
        ("score", "--rows_per_part=0", "--rows_per_part=0: expected at least 1"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(command, argument, expected):
    with pytest.raises(UserError) as caught:
        parse_flags(config_of(command), [*required_arguments(command), argument])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "refused", "expected"),
    [
        ({"at_least": 0, "unit": "steps"}, -1, "0 or more steps"),
        ({"at_least": 2, "unit": "steps"}, 1, "at least 2 steps"),
        ({"above": 0, "unit": "epochs"}, 0.0, "more than 0 epochs"),
        ({"at_least": 1, "at_most": 9}, 10, "1 to 9"),
        ({"at_least": 0, "below": 1, "expected": "a rate in [0, 1)"}, 1.0, "a rate in [0, 1)"),
        ({"at_least": 1}, math.nan, "at least 1"),
        ({"pattern": "[a-z]+", "expected": "letters"}, "ab1", "letters"),
    ],
)
def test_bounds_say_what_they_expect(rules, refused, expected):
    with pytest.raises(UserError) as caught:
        Option("Help.", **rules).validate("flag", refused)
    assert str(caught.value) == f"--flag={refused}: expected {expected}"
    Option("Help.", **rules).validate("flag", None)


def test_a_command_s_flags_do_not_collide():
    for kind in map(config_of, COMMANDS):
        names = [item.name for item in option_fields(kind)]
        assert len(names) == len(set(names))
        assert all(dataclasses.is_dataclass(item.type) is False for item in option_fields(kind))
