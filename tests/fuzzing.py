"""Files of good rows with damage between and in them, and which good rows must come through."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from hypothesis import strategies as st
from pyarrow import parquet
from tf_examples import example

from trainer.data.records import frame_records

# Lines that are no row, or may be one of another id, in every format of lines.
JUNK = st.one_of(
    st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")),
    st.sampled_from(
        [
            b"\xff\xfe\x00", b"\x00" * 50, b"\xed\xa0\x80", b"{", b"[" * 3000, b'{"text": ' * 3000,
            b'{"text": "' + b"\\ud800" * 3 + b'", "labels": []}', b'{"id": 1' + b"0" * 5000 + b"}",
            b'{"text": 1e999, "labels": NaN}', b'{"text": "x", "labels": [[[]]]}', b"null", b"-",
            b'{"id": [1], "text": "x", "labels": ["a"]}', b"\xef\xbb\xbf{}", b'{"text": null}',
            b'{"text": "x", "labels": {"a": 1}}', b'{"text": "x", "labels": "[" }', b"\x1a", b"\\",
            b",,,,,,,,", b"a,b", b"a\tb", b"\t\t\t\t\t", b"   ", b"\x0c", b"\xc2\x85",
            b"\xe2\x80\xa8",
            b'{"text": "x", "labels": ["\\udfff"]}', b'{"text": "x", "labels": [1, null, true]}',
            b'{"text": {"a": [1]}, "labels": ["a"]}', b'{"text": "   ", "labels": ["a"]}',
            b'{"text": "x", "labels": "' + b"9" * 5000 + b'"}', b'{"text": "x"}', b"{}", b'"',
        ]
    ),
)  # fmt: skip
LABELS = ("a", "b")


@dataclass(frozen=True)
class Fuzzed:
    """A file, the flags that it takes, and what a command has to make of it.

    `good` are the ids and texts of the rows that must come through if the file is taken. It may be
    refused if `may_refuse`.
    """

    path: Path
    flags: tuple[str, ...]
    good: dict[str, str]
    may_refuse: bool


def _good_text(number: int, word: str) -> str:
    return f"row {number} {word}".strip()


def _json_line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=row["text"].isascii()).encode()


def _csv_line(separator: str) -> Callable[[dict], bytes]:
    def line(row: dict) -> bytes:
        quoted = ['"' + value.replace('"', '""') + '"' for value in (row["id"], row["text"])]
        return separator.join([*quoted, '"' + row["labels"][0] + '"']).encode()

    return line


def _words_line(row: dict) -> bytes:
    text = row["text"].replace("\n", " ").replace("\r", " ")
    return "\t".join([row["id"], " ".join(row["labels"]), text]).encode()


LINE_FORMATS: dict[str, tuple[Callable[[dict], bytes], bytes, tuple[str, ...]]] = {
    "jsonl": (_json_line, b"", ()),
    "csv": (_csv_line(","), b"id,text,labels\n", ()),
    "tsv": (_csv_line("\t"), b"id\ttext\tlabels\n", ()),
    "txt": (_words_line, b"", ("--input_format=libmultilabel",)),
}
WORDS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12
).map(lambda word: word.strip())


@st.composite
def rows_of(draw) -> list[dict]:
    """Some good rows, at least two."""
    words = draw(st.lists(WORDS, min_size=2, max_size=12))
    return [
        {"id": f"good-{i}", "text": _good_text(i, word), "labels": [LABELS[i % 2]]}
        for i, word in enumerate(words)
    ]


@st.composite
def damage_of(draw) -> tuple[str, float, int]:
    """How a whole file is damaged: kind, where (a share of its bytes), and a byte."""
    kind = draw(st.sampled_from(["none", "none", "none", "cut", "flip", "insert"]))
    return kind, draw(st.floats(0, 1)), draw(st.integers(0, 255))


def _damage(data: bytes, damage: tuple[str, float, int]) -> bytes:
    kind, where, byte = damage
    at = int(where * (len(data) - 1))
    if kind == "cut":
        return data[: max(at, 1)]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (byte or 1)]) + data[at + 1 :]
    return data[:at] + bytes([byte] * 7) + data[at:] if kind == "insert" else data


@st.composite
def lines_of_junk(draw) -> tuple[str, list[tuple[bytes, dict | None]]]:
    """The ending of a file, and its lines, good ones with their rows and junk between them."""
    ending = draw(st.sampled_from(sorted(LINE_FORMATS)))
    encode, header, _ = LINE_FORMATS[ending]
    rows = draw(rows_of())
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    if ending != "jsonl":
        # A row of one physical line: a quote in junk may pair with one of a row of several.
        rows = [row | {"text": " ".join(row["text"].split())} for row in rows]
    if ending in ("csv", "tsv"):
        rows = [row | {"text": row["text"].replace('"', " ").strip()} for row in rows]
    lines: list[tuple[bytes, dict | None]] = []
    if header:
        lines.append((header.removesuffix(b"\n") + end, None))
    # What the file is shows in its beginning, so that is good.
    lines.append((encode(rows[0]) + end, rows[0]))
    for row in rows[1:]:
        lines += [(junk + end, None) for junk in draw(st.lists(JUNK, max_size=2))]
        lines.append((encode(row) + end, row))
    lines += [(junk + end, None) for junk in draw(st.lists(JUNK, max_size=1))]
    return ending, lines


def write_lines(folder: Path, drawn, compression: str, damage) -> Fuzzed:
    """A file of lines on the disk, perhaps compressed, and then perhaps damaged."""
    ending, lines = drawn
    flags = LINE_FORMATS[ending][2]
    data = b"".join(line for line, _ in lines)
    good = {row["id"]: row["text"] for _, row in lines if row is not None}
    path = folder / f"rows.{ending}{'.' if compression else ''}{compression}"
    kind = damage[0]
    if not compression:
        path.write_bytes(_damage(data, damage))
        at = int(damage[1] * (len(data) - 1))
        hurt = at if kind != "none" else len(data)
        start, may_refuse = 0, False
        for place, (line, row) in enumerate(lines):
            # A byte may also become, or stop being, the end of the line before.
            is_hurt = start <= hurt + 7 and hurt <= start + len(line)
            is_lost = is_hurt if kind in ("flip", "insert") else start + len(line) > hurt
            if is_lost and row is not None:
                good.pop(row["id"], None)
            may_refuse |= is_lost and place < 2
            if is_lost and row is None and place == 0:
                good.clear()  # Columns may be called otherwise now.
            start += len(line)
        return Fuzzed(path, flags, good, may_refuse)
    if compression == "gz":
        data = gzip.compress(data, mtime=0)
    else:
        data = pyarrow.compress(data, "zstd", asbytes=True)
    path.write_bytes(_damage(data, damage))
    # Without a checksum, zstd gives other rows for other bytes.
    is_sure = compression == "gz" or kind in ("none", "cut")
    return Fuzzed(path, flags, good if is_sure else {}, kind != "none")


def write_binary(folder: Path, ending: str, rows: list[dict], bad: int, damage) -> Fuzzed:
    """A Parquet, Arrow or TFRecord file, some of whose rows have no usable text."""
    chance = random.Random(bad)
    texts = [row["text"].encode() for row in rows]
    good = {row["id"]: row["text"] for row in rows}
    for place, row in enumerate(rows):
        if bad and chance.random() < 0.3 and place:
            texts[place] = chance.choice([b"\xff\xfe", b"", b"  ", b"\xed\xa0\x80"])
            del good[row["id"]]
    path = folder / f"rows.{ending}"
    data = _records(rows, texts, bad) if ending == "tfrecord" else _table(rows, texts, ending, bad)
    path.write_bytes(_damage(data, damage))
    # Parquet and Arrow have no checksum over all: other bytes may be other rows.
    is_sure = ending == "tfrecord" or damage[0] in ("none", "cut")
    return Fuzzed(path, (), good if is_sure else {}, damage[0] != "none")


def _records(rows: list[dict], texts: list[bytes], bad: int) -> bytes:
    records = [
        example(id=row["id"], text=text, labels=row["labels"])
        for row, text in zip(rows, texts, strict=True)
    ]
    if bad:
        records.insert(1, random.Random(bad).randbytes(bad % 50))
    return b"".join(frame_records(records))


def _table(rows: list[dict], texts: list[bytes], ending: str, bad: int) -> bytes:
    as_bytes = pyarrow.array(texts, pyarrow.binary())
    columns = {
        "id": [row["id"] for row in rows],
        "text": pyarrow.Array.from_buffers(pyarrow.string(), len(texts), as_bytes.buffers()),
        "labels": [row["labels"] for row in rows],
    }
    table, sink = pyarrow.table(columns), pyarrow.BufferOutputStream()
    if ending == "parquet":
        chosen = ("none", "snappy", "zstd")[bad % 3]
        parquet.write_table(table, sink, row_group_size=3, compression=chosen)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, 3)
    return sink.getvalue().to_pybytes()


@st.composite
def fuzzed_files(draw):
    """What `write_fuzzed` takes."""
    damage = draw(damage_of())
    if draw(st.integers(0, 2)):
        return "lines", draw(lines_of_junk()), draw(st.sampled_from(["", "", "gz", "zst"])), damage
    ending = draw(st.sampled_from(["parquet", "arrow", "tfrecord"]))
    return ending, draw(rows_of()), draw(st.integers(0, 1000)), damage


def write_fuzzed(folder: Path, drawn) -> Fuzzed:
    """Writes one of `fuzzed_files` to a folder."""
    kind, what, how, damage = drawn
    if kind == "lines":
        return write_lines(folder, what, how, damage)
    return write_binary(folder, kind, what, how, damage)
