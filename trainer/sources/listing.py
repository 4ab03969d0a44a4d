"""The files that inputs name (paths, globs, folders, saved data sets, URLs), and their versions.

A command reads its inputs twice, and may take hours. A file that somebody rewrites meanwhile would
give rows that fit neither their labels nor the plan, so versions are compared at the end.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from trainer.errors import UserError
from trainer.sources.formats.json_objects import is_document
from trainer.sources.input_files import (
    COMPRESSIONS,
    FORMATS,
    absolute_name,
    changed,
    format_of,
    is_data_set,
    location,
    with_columns,
    with_json_field,
)
from trainer.storage import filesystem
from trainer.storage.own_files import PlainName, fields, load, many


def version_of(name: str) -> tuple[int, ...]:
    """Size, time and inode of a file; the generation of an object.

    A data set has no version: TensorFlow Datasets never writes again to one that it prepared.
    """
    path = location(name)
    if is_data_set(name):
        return ()
    if not filesystem.is_remote(path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return ()
        return status.st_size, status.st_mtime_ns, status.st_ino
    from trainer.storage.gcs import find_object

    found = find_object(path)
    return () if found is None else (found.generation,)


class FileVersions:
    """The versions of files at one moment."""

    def __init__(self, names: Sequence[str]) -> None:
        self._versions = dict(zip(names, for_each_file(names, version_of), strict=True))

    def check(self, names: Iterable[str] | None = None) -> None:
        """Checks that files, by default all, have not changed; a UserError names one that has."""
        chosen = list(dict.fromkeys(self._versions if names is None else names))
        for name, version in zip(chosen, for_each_file(chosen, version_of), strict=True):
            if version != self._versions[name]:
                raise changed(name)


Result = TypeVar("Result")
_SAVED_SPLITS, _SAVED_STATE = "dataset_dict.json", "state.json"
# Files with which `datasets` and the hub describe a data set.
_DESCRIPTIONS = frozenset((_SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"))
_ENDINGS = f"{', '.join(FORMATS)} (or with {', '.join(COMPRESSIONS)})"
FILES_AT_ONCE = 16
_TEXT_FORMATS = ("jsonl", "json", "csv", "tsv", "text", "libmultilabel")
_EXPORT = "export its rows as CSV or JSONL"
# How files of other kinds begin, which people name .csv or .json all the same.
_OTHER_CONTENTS = {
    b"\x1f\x8b\x08": ("what gzip compressed", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("what zstd compressed", "add .zst to its name"),
    b"PAR1\x15": ("Parquet", "say --input_format=parquet"),
    b"ARROW1\0\0": ("Arrow", "say --input_format=arrow"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", f"unpack it, or {_EXPORT}"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Excel workbook", _EXPORT),
    b"SQLite format 3\0": ("an SQLite database", _EXPORT),
    b"%PDF-": ("a PDF document", "bring its text"),
    b"BZh": ("what bzip2 compressed", "decompress it"),
    b"\xfd7zXZ\0": ("what xz compressed", "decompress it"),
}


def list_files(
    inputs: Sequence[str],
    input_format: str | None = None,
    source_split: str | None = None,
    tfds_data_dir: str | None = None,
    columns: Sequence[str] = (),
    json_field: str | None = None,
) -> list[str]:
    """The files that paths, globs and folders name: sorted, unique, none of them empty.

    A folder stands for the files in it (not below it) whose names have a known ending; hidden ones
    and those that begin with "_" are left out. A folder that the `datasets` library saved stands
    for its Arrow files. `tfds:NAME` becomes one name a split, `source_split` alone if it is given.
    `input_format` is the format of all files, whatever their names say; without it, the beginning
    of a JSON file tells whether it is lines. `columns` are the names of their columns, which are
    tables without a header; `json_field` holds the rows of all files, which are JSON then. A
    UserError says that an input names nothing, or that a file is empty, or of an unknown format or
    another than these say.
    """
    files: set[str] = set()
    for item in inputs:
        if is_data_set(item):
            from trainer.sources.formats.tfds import list_splits

            files.update(list_splits(item, source_split, tfds_data_dir))
            continue
        found = _expand(item, source_split, any_ending=input_format is not None)
        if not found:
            raise UserError(f"--input={item}: {_why_nothing(item, source_split)}")
        files.update(f"{input_format}:{path}" if input_format else path for path in found)
    # A file that is named twice, also by another way to it, is read once.
    once = {absolute_name(name): name for name in sorted(files, reverse=True)}
    chosen = sorted(once.values())
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        chosen = list(pool.map(partial(_checked_name, json_field=json_field), chosen))
    return [with_columns(name, columns) for name in chosen] if columns else chosen


def _checked_name(name: str, json_field: str | None) -> str:
    """The name of a file that is there, with its format before it if that is JSON documents."""
    if not name.isascii() and name != name.encode("utf-8", "replace").decode("utf-8"):
        shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
        raise UserError(f"{shown}: its name is not UTF-8; rename the file")
    kind, _ = format_of(name)
    path = location(name)
    if not is_data_set(name) and not filesystem.is_remote(path):
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: not readable; check its permissions")
        if os.path.getsize(path) == 0:
            raise UserError(f"{path}: empty file, expected rows; remove it from --input")
        _check_content(name)
    if json_field is not None and kind not in ("json", "jsonl"):
        raise UserError(f"--json_field={json_field}: {path} is {kind}, expected JSON")
    if json_field is None and (kind != "jsonl" or name != path or not is_document(path)):
        return name
    return with_json_field(name, json_field)


def _check_content(name: str) -> None:
    """Checks that a local file that is read as text does not begin like one that is none."""
    kind, compression = format_of(name)
    if kind not in _TEXT_FORMATS or compression:
        return
    with open(location(name), "rb") as file:
        head = file.read(16)
    for beginning, (what, remedy) in _OTHER_CONTENTS.items():
        if head.startswith(beginning):
            raise UserError(f"{location(name)}: holds {what}, expected {kind}; {remedy}")


def _expand(item: str, source_split: str | None, any_ending: bool) -> list[str]:
    if filesystem.is_remote(item):
        return _expand_remote(item, source_split, any_ending)
    if os.path.isdir(item):
        return _expand_folder(item, source_split, any_ending)
    if os.path.exists(item):
        paths = [item]
    else:
        paths = [path for path in glob.glob(item, recursive=True) if os.path.isfile(path)]
    if source_split is not None and paths:
        raise UserError(
            f"--source_split={source_split}: {paths[0]} is a file and has no splits; expected a "
            "folder of a data set or tfds:NAME; leave the flag out, or name the split's files"
        )
    return paths


def _expand_folder(folder: str, source_split: str | None, any_ending: bool) -> list[str]:
    splits_path = os.path.join(folder, _SAVED_SPLITS)
    if os.path.exists(splits_path):
        names = _read_saved(splits_path, fields(splits=many(PlainName)))["splits"]
        if source_split is not None and source_split not in names:
            raise UserError(
                f"--source_split={source_split}: {folder} has {', '.join(names)}; name one of these"
            )
        chosen = names if source_split is None else [source_split]
        return [path for name in chosen for path in _saved_files(os.path.join(folder, str(name)))]
    if os.path.exists(os.path.join(folder, _SAVED_STATE)):
        return _saved_files(folder)
    names = [name for name in os.listdir(folder) if not os.path.isdir(os.path.join(folder, name))]
    paths = [os.path.join(folder, name) for name in _usable(names, source_split, any_ending)]
    below = os.path.join(folder, "data")  # As repositories of data sets on the hub are laid out.
    if not paths and os.path.isdir(below):
        return _expand_folder(below, source_split, any_ending)
    return paths


def _saved_files(folder: str) -> list[str]:
    """The Arrow files of a data set that `save_to_disk` wrote, in order."""
    kind = fields(_data_files=many(fields(filename=PlainName)))
    state = _read_saved(os.path.join(folder, _SAVED_STATE), kind)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: its rows are chosen and ordered by a file of indices, which is not read; "
            "call flatten_indices() and save it again"
        )
    return [os.path.join(folder, item["filename"]) for item in state["_data_files"]]


def _read_saved(path: str, kind: Any) -> Any:
    what = "not what `datasets` writes with save_to_disk"
    try:
        return load(kind, path, "save the data set again", what=what)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); save the data set again") from None


def _expand_remote(url: str, source_split: str | None, any_ending: bool) -> list[str]:
    """The objects of a URL: one, those that match a pattern, or those right below a folder."""
    from trainer.storage.gcs import find_object, list_objects

    if glob.has_magic(url):
        before = re.split(r"[*?[]", url, maxsplit=1)[0]
        found = list_objects(before[: before.rindex("/") + 1])
        matches = _glob_matcher(url)
        return [item.url for item in found if item.bytes and matches(item.url)]
    if not url.endswith("/") and find_object(url) is not None:
        return [url]
    folder = url.rstrip("/") + "/"
    found = list_objects(folder, below=False)
    names = [item.url.removeprefix(folder) for item in found if item.bytes]
    return [folder + name for name in _usable(names, source_split, any_ending)]


def _glob_matcher(pattern: str) -> Callable[[str], bool]:
    """Matches whole URLs; "*" stays within a folder and "**" does not, as in `glob`."""
    parts = [
        r"(?:.*/)?" if part == "**/" else fnmatch.translate(part)[4:-3].replace(".*", "[^/]*")
        for part in re.split(r"(\*\*/)", pattern)
    ]
    expression = re.compile("".join(parts))
    return lambda url: expression.fullmatch(url) is not None


def _usable(names: Iterable[str], source_split: str | None, any_ending: bool) -> list[str]:
    """The names in a folder that count as input; of one split, if one is asked for."""
    usable = [name for name in names if not name.startswith((".", "_"))]
    usable = [name for name in usable if any_ending or _has_format(name)]
    usable = [name for name in usable if name not in _DESCRIPTIONS]
    if any(name.endswith(".arrow") for name in usable):
        usable = [name for name in usable if name != _SAVED_STATE]
    if source_split is None:
        return usable
    begins = re.compile(rf"{re.escape(source_split)}(?!\w)")
    return [name for name in usable if begins.match(name)]


def _has_format(path: str) -> bool:
    try:
        format_of(path)
    except UserError:
        return False
    return True


def _why_nothing(item: str, source_split: str | None) -> str:
    if filesystem.is_remote(item):
        return "no object is called so, matches or lies below it with a known ending; check the URL"
    if os.path.isdir(item):
        of_split = f"begins with {source_split!r} and " if source_split else ""
        return f"the folder holds no file that {of_split}ends in {_ENDINGS}"
    if glob.has_magic(item):
        return "no file matches; check the pattern and quote it against the shell"
    return "no such file or folder; check the path"


def for_each_file(names: Sequence[str], function: Callable[[str], Result]) -> Iterator[Result]:
    """A function's results for all names, in order; in threads, as each call mostly waits.

    The first error is raised: of a data set if one has any, else of the first file in order.
    """
    # Data sets in this thread, where a test or a caller may have put its builder.
    here = {name: function(name) for name in names if is_data_set(name)}
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        there = pool.map(function, [name for name in names if name not in here])
        for name in names:
            yield here[name] if name in here else next(there)
