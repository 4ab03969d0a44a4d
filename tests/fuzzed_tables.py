"""Files of whole rows as other programs write them, and the same bytes as pandas reads them."""

import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pandas

# What cells are made of: whatever means something to a reader of tables, and words of a header.
PIECES = [
    "word", " ", "  ", ",", ";", "\t", "|", '"', '""', "'", "\n", "\r\n", "\r", "é", "日本", "😀",
    "a\ufeffb", "\u2028", "\x85", "\x0c", "\x1a", "text", "labels", "id", "NA", "null", "nan",
    "a,b", "1.0", "0042", "\\", "#", "=1+1", "\\n", "sep=,", "[", "{", "'a', 'b'", "id,text,labels",
]  # fmt: skip
COLUMNS = ["id", "text", "labels"]
QUOTING = [csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]


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
    columns: list[str]
    names: tuple[str, ...] = ()
    is_reordered: bool = False


def _rows(chance: Random) -> list[dict[str, str]]:
    """Some rows of four columns; the first is like no header."""
    rows = []
    for number in range(chance.randint(1, 12)):
        text, labels, note = (
            "".join(chance.choices(PIECES, k=chance.randint(0, 6))) for _ in range(3)
        )
        name = "" if chance.random() < 0.2 else f"row {number}."
        row = {"id": name, "text": text, "labels": labels, "note": note}
        rows.append({key: value if number else f"<{value}>" for key, value in row.items()})
    return rows


def write_table(folder: Path, chance: Random) -> Fuzzed:
    """CSV or TSV, with or without a header, perhaps several files in one."""
    rows, separator = _rows(chance), chance.choice(",\t")
    columns = chance.choice([["text"], COLUMNS, COLUMNS, [*COLUMNS, "note"], [*COLUMNS, "note"]])
    columns = chance.sample(columns, len(columns))
    has_header = chance.random() < 0.7
    orders = [columns] * min(chance.choice([1, 1, 2, 3]), len(rows))
    if has_header and len(orders) > 1 and chance.random() < 0.2:
        orders[-1] = columns[::-1]
    text, is_sure = "", True
    for place, order in enumerate(orders):
        cells = [[row[name] for name in order] for row in rows[place :: len(orders)]]
        header = order if has_header else None
        how, quoting, end = (
            chance.choice(of) for of in (("pandas", "csv", "hand"), QUOTING, ("\n", "\r\n"))
        )
        text += chance.choice(["", "\ufeff"]) + chance.choice(["", "", "\n"])
        if how == "hand":
            lines = cells if header is None else [header, *cells]
            text += "".join(_line_by_hand(line, separator, chance) + end for line in lines)
        else:
            text += _table(how, cells, header, separator, end, quoting)
            # Carriage returns that are not quoted.
            returns = "".join(cell.replace("\r\n", "") for row in cells for cell in row)
            is_sure &= "\r" not in returns or quoting != csv.QUOTE_MINIMAL or end == "\r\n"
    text = chance.choice([text, text.rstrip("\r\n")])
    # Quotes over several lines that are rows themselves mean nothing in TSV, and a line of blanks
    # is none for pandas.
    used = "".join(row[name] for row in rows for name in columns)
    is_sure &= not (separator == "\t" in used and "\n" in used)
    is_sure &= len(columns) > 1 or all(row["text"].strip() for row in rows)
    path = _write(folder / ("x.tsv" if separator == "\t" else "x.csv"), text, chance)
    # A mark in the middle, which pandas takes for a letter, is of a file that was joined.
    plain = text.removeprefix("\ufeff").replace("\n\ufeff", "\n").encode()
    frame = pandas.read_csv(
        io.BytesIO(plain), sep=separator, dtype=str, keep_default_na=False, index_col=False,
        header=0 if has_header else None, names=None if has_header else columns,
        on_bad_lines="skip",
    )  # fmt: skip
    names = [name for name in COLUMNS if name in columns]
    expected = _tuples(frame, names)
    written = [tuple(row[name] for name in names) for row in rows]
    given = () if has_header else tuple(columns)
    positions = list(range(len(expected))) if is_sure else None
    return Fuzzed(path, expected, written, positions, names, given, orders[-1] != columns)


def _table(how: str, rows, header, separator: str, end: str, quoting) -> str:
    if how == "pandas":
        frame = pandas.DataFrame(rows, columns=header)
        return frame.to_csv(
            index=False, header=header is not None, sep=separator, lineterminator=end,
            quoting=quoting,
        )  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows(rows if header is None else [header, *rows])
    return buffer.getvalue()


def _line_by_hand(row: list[str], separator: str, chance: Random) -> str:
    """A line, some of its values quoted though they need not be."""
    values = []
    for value in row:
        must = len(row) == 1 or any(sign in value for sign in (separator, '"', "\n", "\r"))
        quotes = '"' + value.replace('"', '""') + '"'
        values.append(quotes if must or chance.random() < 0.3 else value)
    return separator.join(values)


def _write(path: Path, text: str, chance: Random) -> Path:
    if chance.random() < 0.2:
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def _tuples(frame: pandas.DataFrame, names: list[str]) -> list[tuple]:
    return list(frame[names].itertuples(index=False, name=None))


def write_objects(folder: Path, chance: Random) -> Fuzzed:
    """JSONL: rows as pandas or the json module writes them, blank lines and marks between them."""
    rows = [{name: row[name] for name in COLUMNS} for row in _rows(chance)]
    if chance.random() < 0.5:
        rows = [row | {"labels": row["labels"].split(",")} for row in rows]
    text, is_ascii = "", chance.random() < 0.5
    for row in rows:
        line = json.dumps(row, ensure_ascii=is_ascii)
        if chance.random() < 0.5:
            frame = pandas.DataFrame([row])
            line = frame.to_json(orient="records", lines=True, force_ascii=is_ascii).strip()
        text += chance.choice(["", "", "\ufeff"]) + line + chance.choice(["\n", "\r\n", "\n\n"])
    path = _write(folder / "x.jsonl", text, chance)
    lines = text.replace("\ufeff{", "{").split("\n")
    frame = pandas.read_json(
        io.BytesIO("\n".join(lines).encode()), lines=True, dtype=False, convert_dates=False
    )
    positions = [number for number, line in enumerate(lines) if line.strip()]
    written = [tuple(row.values()) for row in rows]
    return Fuzzed(path, _tuples(frame, COLUMNS), written, positions, COLUMNS)


def write_frame(folder: Path, chance: Random) -> Fuzzed:
    """Parquet as pandas writes it: row groups, categories, lists, missing texts."""
    frame = pandas.DataFrame(_rows(chance))
    frame["text"] = frame["text"].mask([chance.random() < 0.2 for _ in frame["text"]], None)
    labels = chance.choice(["text", "list", "category"])
    if chance.random() < 0.5:
        frame = frame.astype({"text": "string"})
    if labels == "category":
        frame = frame.astype({"labels": "category"})
    elif labels == "list":
        frame["labels"] = frame["labels"].str.split(",")
    path = folder / "x.parquet"
    frame.to_parquet(path, row_group_size=chance.randint(1, 4))
    read = pandas.read_parquet(path)
    read["labels"] = [list(item) if labels == "list" else item for item in read["labels"]]
    read["text"] = read["text"].astype(object).where(read["text"].notna(), None)
    expected = _tuples(read, COLUMNS)
    return Fuzzed(path, expected, expected, list(range(len(expected))), COLUMNS)


def write_fuzzed_rows(folder: Path, seed: int) -> Fuzzed:
    """Writes a file to a folder: most are tables."""
    chance = Random(seed)
    writers = [write_table, write_objects, write_frame]
    return chance.choices(writers, [4, 1, 1])[0](folder, chance)
