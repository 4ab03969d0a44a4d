"""What `submit` is to run: Multihot commands behind `--`, checked before anything is sent."""

import difflib
from collections.abc import Sequence
from typing import Any

from trainer.config import COMMANDS
from trainer.errors import UserError
from trainer.flags import parse_flags

Commands = tuple[tuple[str, ...], ...]

# What each command writes, and the flags of what it reads. (`sample` takes a local path only.)
_WRITTEN = {
    "sample": "output",
    "prepare": "data_dir",
    "train": "model_dir",
    "evaluate": "model_dir",
    "report": "model_dir",
    "export": "export_dir",
    "score": "output_dir",
}
_READ = ("input", "labels", "data_dir", "model_dir", "model", "tfds_data_dir")
# Neither files nor folders, though they stand where these could.
_NO_FILES = ("sample:", "tfds:")


def split_commands(arguments: Sequence[str]) -> Commands:
    """What follows the first `--`, split at each further one."""
    commands: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            commands.append([])
        else:
            commands[-1].append(argument)
    return tuple(map(tuple, commands))


def parse_commands(arguments: Sequence[str]) -> Commands:
    """Checks commands that are to run on other machines.

    Args:
      arguments: what follows the first `--` of `submit`: a command and its flags, and after each
        further `--` one more.

    Returns:
      The commands, each as (name, flag, ...).

    Raises:
      UserError: if one is no command or its flags do not parse, if it reads what lies on this
        machine only, or if what it writes would be lost with the machine that it runs on.
    """
    commands = split_commands(arguments)
    local: dict[str, str] = {}
    for command in commands:
        if not command:
            raise UserError(
                "expected a command behind `--`, as in `… -- train --data_dir=gs://… "
                "--model_dir=gs://…`"
            )
        name, flags = command[0], command[1:]
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(COMMANDS)}"
            raise UserError(f"-- {name}: no command that can be submitted; {hint}")
        try:
            config: Any = parse_flags(COMMANDS[name], flags)
        except UserError as error:
            raise UserError(f"-- {name}: {error}") from None
        _check_places(name, config, local)
    for path, name in local.items():
        raise UserError(
            f"-- {name} --{_WRITTEN[name]}={path}: would be lost with the machine that runs it; "
            "expected gs://BUCKET/FOLDER"
        )
    return commands


def _check_places(name: str, config: Any, local: dict[str, str]) -> None:
    """Checks what one command reads and writes.

    Args:
      name: of the command.
      config: its flags.
      local: what commands before it wrote to local paths that nobody has read yet, by path; is
        brought up to date.
    """
    written = _WRITTEN[name]
    for flag in _READ:
        values = getattr(config, flag, None)
        if flag == written and name in ("prepare", "train"):
            continue
        for path in (values,) if isinstance(values, str) else values or ():
            if "://" in path or path.startswith(_NO_FILES):
                continue
            if path not in local:
                raise UserError(
                    f"-- {name} --{flag}={path}: lies on this machine, where the command will not "
                    "run; copy it with `gcloud storage cp -r` and give gs://BUCKET/FOLDER"
                )
            if flag != written:
                local.pop(path)
    target = getattr(config, written)
    if "://" in target:
        return
    if name == "train":
        raise UserError(
            f"-- train --model_dir={target}: checkpoints have to outlive the machine that writes "
            "them; expected gs://BUCKET/FOLDER"
        )
    local[target] = name
