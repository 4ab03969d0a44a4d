"""The labels of a corpus that is prepared: how they are read, whether they can be, which stay."""

import itertools

from trainer.config import PrepareConfig
from trainer.data.metadata import Metadata
from trainer.errors import UserError
from trainer.preparation.row_index import Ledger
from trainer.sources.labels import LabelError, LabelReader, check_unique, read_label_file
from trainer.sources.reader import read_segment, whole_file
from trainer.sources.rows import Columns, Row

_ROWS_TO_CHECK = 100


def make_reader(config: PrepareConfig, previous: Metadata | None) -> LabelReader:
    """What reads the labels of a row, as the flags or the folder's earlier splits say.

    Raises:
      UserError: if --labels and --label_field do not go together.
    """
    columns = config.label_field
    check_unique(columns, f"--label_field={','.join(columns)}")
    names: tuple[str, ...] | None = None
    if config.labels is not None:
        names = read_label_file(config.labels)
    elif len(columns) > 1:
        names = columns
    if names is not None and len(columns) > 1 and set(names) != set(columns):
        differing = ", ".join(sorted(set(names) ^ set(columns))[:5])
        raise UserError(
            f"--labels={config.labels}: names other labels than --label_field ({differing}); "
            "expected the same names, or leave --labels out"
        )
    if previous is None:
        return LabelReader(names, columns, config.label_delimiter)
    return LabelReader(
        previous.labels, columns, config.label_delimiter, frozenset(previous.dropped_labels)
    )


def check_labels(name: str, columns: Columns, reader: LabelReader) -> None:
    """Checks that of the first rows of a file some have labels that can be read.

    Raises:
      UserError: if there are several rows, and none has.
    """
    rows = (row for row in read_segment(whole_file(name), columns) if isinstance(row, Row))
    reasons = []
    for row in itertools.islice(rows, _ROWS_TO_CHECK):
        try:
            reader.read(row.labels)
            return
        except LabelError as error:
            reasons.append(f"row {row.position}: {error}")
    if len(reasons) > 1:
        raise UserError(
            f"{name}: {reasons[0]}; none of the first {len(reasons)} rows has labels that can be "
            f"read; name the right column with --label_field (now {','.join(columns.labels)})"
        )


def choose_labels(
    config: PrepareConfig, reader: LabelReader, ledger: Ledger
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The labels in order, and those of the data that are too rare, with their documents.

    Raises:
      UserError: if none is left.
    """
    counts = dict(zip(ledger.names, ledger.label_counts, strict=True))
    if reader.names is not None:
        return reader.names, {}
    enough = config.min_label_count
    labels = tuple(sorted(name for name, count in counts.items() if count >= enough))
    if not labels:
        most = max(counts.values(), default=0)
        raise UserError(
            f"--label_field={','.join(config.label_field)}: no label has --min_label_count="
            f"{enough} documents, the commonest has {most}; check the column, or lower the count"
        )
    return labels, {name: counts[name] for name in sorted(counts) if counts[name] < enough}
