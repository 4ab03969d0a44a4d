"""Files of whole rows as other programs write them, and the same bytes as pandas reads them."""

import csv
import gzip
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pandas
from hypothesis import strategies as st

# What cells are made of: whatever means something to a reader of tables, and words of a header.
PIECES = [
    "word", " ", "  ", ",", ";", "\t", "|", '"', '""', "'", "\n", "\r\n", "\r", "é", "日本", "😀",
    "a\ufeffb", "\u2028", "\x85", "\x0c", "\x1a", "text", "labels", "id", "NA", "null", "nan",
    "a,b", "1.0", "0042", "\\", "#", "=1+1", "\\n", "sep=,", "[", "{", "'a', 'b'", "id,text,labels",
]  # fmt: skip
CELLS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
LINE_ENDS = st.sampled_from(["\n", "\r\n"])


@dataclass(frozen=True)
class Fuzzed:
    """A file; `expected` are (id, text, labels) of its rows as pandas reads them.

    A header that comes again is among them. `written` are the rows as they were written; an id may
    be empty. `positions` are the row numbers of `expected`, or None where an unquoted carriage
    return leaves it open what a row is. `names` are those of --columns.
    """

    path: Path
    expected: list[tuple]
    written: list[tuple]
    positions: list[int] | None
    columns: tuple[str, ...]
    names: tuple[str, ...] = ()
    is_reordered: bool = False


@st.composite
def rows_of_cells(draw) -> list[dict[str, str]]:
    """Some rows; the first is like no header."""
    rows = []
    for number, text in enumerate(draw(st.lists(CELLS, min_size=1, max_size=8))):
        name = f"row {number}." if not number or draw(st.integers(0, 3)) else ""
        row = {"id": name, "text": text, "labels": draw(CELLS), "note": draw(CELLS)}
        rows.append({key: value if number else f"<{value}>" for key, value in row.items()})
    return rows


@st.composite
def tables(draw):
    """CSV and TSV, with and without a header, some of them several files in one."""
    rows, separator = draw(rows_of_cells()), draw(st.sampled_from([",", "\t"]))
    columns = draw(st.permutations(["id", "text", "labels", "note"]))
    columns = draw(st.sampled_from([columns, [name for name in columns if name != "note"]]))
    columns = columns if draw(st.integers(0, 9)) else ["text"]
    has_header = draw(st.integers(0, 3)) > 0
    num_files = min(draw(st.sampled_from([1, 1, 2, 3])), len(rows))
    orders = [columns] * num_files
    if has_header and num_files > 1 and len(columns) > 1 and not draw(st.integers(0, 5)):
        orders[-1] = columns[::-1]
    pieces, are_quoted = [], True
    for place, order in enumerate(orders):
        how = draw(st.sampled_from(["pandas", "csv", "hand"]))
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
        end, cells = draw(LINE_ENDS), [[row[c] for c in order] for row in rows[place::num_files]]
        pieces.append(draw(st.sampled_from(["", "\ufeff"])) + draw(st.sampled_from(["", "\n"])))
        pieces[-1] += _table(how, cells, order if has_header else None, separator, end, quoting)
        if how != "hand" and quoting == csv.QUOTE_MINIMAL and end == "\n":
            returns = [cell.replace("\r\n", "") for row in cells for cell in row]
            are_quoted &= "\r" not in "".join(returns)
    # Quotes over several lines that are rows themselves mean nothing in TSV.
    texts = "".join(cell for row in rows for cell in row.values())
    is_sure = are_quoted and not (separator == "\t" in texts and "\n" in texts)
    # A line of blanks is none for pandas.
    is_sure &= len(columns) > 1 or all(row["text"].strip() for row in rows)
    data = "".join(pieces)
    data = data if draw(st.booleans()) else data.rstrip("\r\n")
    reordered = orders[-1] != columns
    return "table", data, separator, columns, has_header, rows, is_sure, reordered


def _table(how, rows, header, separator: str, end: str, quoting) -> str:
    if how == "pandas":
        frame = pandas.DataFrame(rows, columns=header)
        return frame.to_csv(
            index=False, header=header is not None, sep=separator, lineterminator=end,
            quoting=quoting,
        )  # fmt: skip
    rows = rows if header is None else [header, *rows]
    if how == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
        return buffer.getvalue()
    chance = random.Random(len(rows))
    return "".join(_line_by_hand(row, separator, chance) + end for row in rows)


def _line_by_hand(row: list[str], separator: str, chance: random.Random) -> str:
    """A line, some of its values quoted though they need not be."""
    values = []
    for value in row:
        must = len(row) == 1 or any(sign in value for sign in (separator, '"', "\n", "\r"))
        quotes = '"' + value.replace('"', '""') + '"'
        values.append(quotes if must or chance.random() < 0.3 else value)
    return separator.join(values)


def write_table(folder: Path, drawn) -> Fuzzed:
    """Writes one of `tables` to a folder."""
    _, text, separator, columns, has_header, rows, is_sure, is_reordered = drawn
    kind, data = "tsv" if separator == "\t" else "csv", text.encode()
    path = folder / (f"x.{kind}.gz" if len(data) % 3 == 0 else f"x.{kind}")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    # A mark in the middle, which pandas takes for a letter, is of a file that was joined.
    plain = text.removeprefix("\ufeff").replace("\n\ufeff", "\n").encode()
    frame = pandas.read_csv(
        io.BytesIO(plain), sep=separator, dtype=str, keep_default_na=False, index_col=False,
        header=0 if has_header else None, names=None if has_header else columns,
        on_bad_lines="skip",
    )  # fmt: skip
    names = [name for name in ("id", "text", "labels") if name in columns]
    expected = list(frame[names].itertuples(index=False, name=None))
    written = [tuple(row[name] for name in names) for row in rows]
    positions = list(range(len(expected))) if is_sure else None
    given = () if has_header else tuple(columns)
    return Fuzzed(path, expected, written, positions, tuple(names), given, is_reordered)


@st.composite
def objects(draw):
    """JSONL: rows as pandas or the json module writes them, blank lines and marks between them."""
    rows = [{"id": row["id"], "text": row["text"], "labels": row["labels"]} for row in
            draw(rows_of_cells())]  # fmt: skip
    if draw(st.booleans()):
        rows = [row | {"labels": row["labels"].split(",")} for row in rows]
    by_pandas, is_ascii = draw(st.booleans()), draw(st.booleans())
    pieces = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=is_ascii)
        if by_pandas:
            frame = pandas.DataFrame([row])
            line = frame.to_json(orient="records", lines=True, force_ascii=is_ascii).strip()
        mark, blank = draw(st.sampled_from(["", "", "\ufeff"])), draw(st.sampled_from(["", "\n"]))
        pieces.append(mark + line + draw(LINE_ENDS) + blank)
    return "objects", "".join(pieces), rows


def write_objects(folder: Path, drawn) -> Fuzzed:
    """Writes one of `objects` to a folder."""
    _, text, rows = drawn
    path, data = folder / "x.jsonl", text.encode()
    path = path if len(data) % 3 else folder / "x.jsonl.gz"
    path.write_bytes(data if len(data) % 3 else gzip.compress(data))
    lines = text.replace("\ufeff{", "{").split("\n")
    frame = pandas.read_json(
        io.BytesIO("\n".join(lines).encode()), lines=True, dtype=False, convert_dates=False
    )
    names = ["id", "text", "labels"]
    expected = list(frame[names].itertuples(index=False, name=None))
    positions = [number for number, line in enumerate(lines) if line.strip()]
    return Fuzzed(path, expected, [tuple(row.values()) for row in rows], positions, tuple(names))


@st.composite
def frames(draw):
    """Parquet as pandas writes it: row groups, categories, lists, missing texts."""
    rows = draw(rows_of_cells())
    missing = [draw(st.integers(0, 5)) == 0 for _ in rows]
    labels = draw(st.sampled_from(["text", "list", "category"]))
    return "frame", rows, missing, labels, draw(st.integers(1, 4)), draw(st.booleans())


def write_frame(folder: Path, drawn) -> Fuzzed:
    """Writes one of `frames` to a folder."""
    _, rows, missing, labels, group, has_string_type = drawn
    frame = pandas.DataFrame(rows)
    frame["text"] = frame["text"].mask(missing, None)
    if has_string_type:
        frame = frame.astype({"text": "string"})
    if labels == "category":
        frame = frame.astype({"labels": "category"})
    elif labels == "list":
        frame["labels"] = frame["labels"].str.split(",")
    frame.to_parquet(folder / "x.parquet", row_group_size=group)
    names = ["id", "text", "labels"]
    read = pandas.read_parquet(folder / "x.parquet")
    read["labels"] = [list(item) if labels == "list" else item for item in read["labels"]]
    read["text"] = read["text"].astype(object).where(read["text"].notna(), None)
    expected = list(read[names].itertuples(index=False, name=None))
    positions = list(range(len(expected)))
    return Fuzzed(folder / "x.parquet", expected, expected, positions, tuple(names))


WHOLE_FILES = st.one_of(tables(), tables(), tables(), objects(), frames())
_WRITERS = {"table": write_table, "objects": write_objects, "frame": write_frame}


def write_whole_file(folder: Path, drawn) -> Fuzzed:
    """Writes one of `WHOLE_FILES` to a folder."""
    return _WRITERS[drawn[0]](folder, drawn)
