"""CSV and TSV, streamed through pyarrow: every value as the bytes that stood in the file."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.errors import UserError
from trainer.files import BLOCK_BYTES, format_of


def _open_table(path: str, names: Sequence[str] | None, on_invalid: Any) -> Any:
    """A pyarrow streaming reader of a CSV or TSV file; every column as bytes.

    Args:
      path: the file.
      names: the columns to read; None for all.
      on_invalid: called with every row of the wrong width, which is then left out.
    """
    import pyarrow
    from pyarrow import csv

    kind, compression = format_of(path)
    return csv.open_csv(
        pyarrow.input_stream(path, compression=compression),
        # One thread: with more, pyarrow does not number the rows that it leaves out.
        read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=csv.ParseOptions(
            delimiter="\t" if kind == "tsv" else ",",
            newlines_in_values=True,
            invalid_row_handler=on_invalid,
        ),
        convert_options=csv.ConvertOptions(
            include_columns=list(names) if names is not None else None,
            column_types={name: pyarrow.binary() for name in names or ()},
            strings_can_be_null=False,
            check_utf8=False,
        ),
    )


def table_names(path: str) -> list[str]:
    """The columns of a table's header."""
    import pyarrow

    try:
        with _open_table(path, None, lambda row: "skip") as reader:
            return reader.schema.names
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable table ({error}); check the file") from None


def table_rows(path: str, names: Sequence[str]) -> Iterator[tuple[int, tuple[bytes, ...] | str]]:
    """(row number, values as bytes), or (row number, reason) for a row of the wrong width."""
    import pyarrow

    invalid: deque[tuple[int, str]] = deque()

    def keep(row: Any) -> str:
        # pyarrow counts from 1 and counts the header.
        reason = f"expected {row.expected_columns} columns, found {row.actual_columns}: {row.text}"
        invalid.append((row.number - 2, reason))
        return "skip"

    position = 0
    try:
        with _open_table(path, names, keep) as reader:
            for batch in reader:
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    while invalid and invalid[0][0] == position:
                        yield invalid.popleft()
                        position += 1
                    yield position, values
                    position += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read on after row {position} ({error}); check quotes and the "
            "number of columns there"
        ) from None
    yield from invalid
