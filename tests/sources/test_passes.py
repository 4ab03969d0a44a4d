"""How often commands read their inputs: checksums and row numbers are by-products of reading."""

import contextlib
import io
import json
import random

import google_crc32c
import pytest
from preparing import config

from trainer import prepare, score
from trainer.config import ScoreConfig
from trainer.data.metadata import load_metadata
from trainer.errors import UserError
from trainer.preparation import corpus
from trainer.sources import input_files
from trainer.sources.formats.lines import MAX_LINE_BYTES, cut_bytes, line_format
from trainer.sources.input_files import Extent
from trainer.sources.reader import fingerprint, plan_row_ranges
from trainer.sources.rows import Columns
from trainer.storage import filesystem

NUM_ROWS = 3000


@pytest.fixture
def rows(tmp_path) -> str:
    """Rows of 1 kB on average, some of them blank or broken."""
    path = tmp_path / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(NUM_ROWS):
            row = {"text": f"text {number} " + "word " * (number % 400), "labels": ["a"]}
            file.write((json.dumps(row) if number % 500 else "broken" * (number % 3)) + "\n")
    return str(path)


@pytest.fixture
def bytes_read(rows, monkeypatch) -> list[int]:
    """The sizes of all reads of `rows` from the disk, whoever opens it."""
    sizes = []

    class CountedFile(io.FileIO):
        def readinto(self, buffer):
            sizes.append(super().readinto(buffer))
            return sizes[-1]

        def readall(self):
            raise AssertionError("a file is read as a stream")

    def open_counted(path, mode="r", buffering=-1, **keywords):
        if path != rows:
            return open(path, mode, buffering, **keywords)
        return io.BufferedReader(CountedFile(path), buffering if buffering > 0 else 1 << 13)

    for module in (input_files, filesystem):
        monkeypatch.setattr(module, "open", open_counted, raising=False)
    # So that looks at the first rows, and reading ahead, do not count for much.
    monkeypatch.setattr(input_files, "_BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(input_files, "_BYTES_BEHIND", 1 << 11)
    return sizes


class PoolOfThisProcess:
    def map(self, function, /, *arguments):
        return map(function, *arguments)


def test_prepare_reads_a_file_of_lines_twice(rows, bytes_read, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare, "process_pool", lambda _: contextlib.nullcontext(PoolOfThisProcess())
    )
    monkeypatch.setattr(corpus, "_range_bytes", lambda _: 1 << 17)
    data_dir = str(tmp_path / "data")
    prepare.run(config(rows, data_dir, vocab_size=200, max_rejected=10))
    read = sum(bytes_read)
    num_bytes, checksum = fingerprint(rows)
    assert 1.9 * num_bytes < read < 2.1 * num_bytes
    (described,) = load_metadata(data_dir).source["calls"][0]["inputs"]
    assert described == {"name": rows, "bytes": num_bytes, "checksum": checksum}


def test_score_reads_a_file_of_lines_twice(rows, bytes_read, model, tmp_path, monkeypatch):
    # Rows that choose the shape of the micro-batches are read once more.
    monkeypatch.setattr("trainer.scoring.pipeline._SAMPLED_ROWS", 16)
    monkeypatch.setattr("trainer.scoring.pipeline._SAMPLED_PARTS", 2)
    output_dir = str(tmp_path / "out")
    score.run(
        ScoreConfig(
            model=model, input=(rows,), output_dir=output_dir, rows_per_part=1000, max_rejected=10
        )
    )
    read = sum(bytes_read)
    num_bytes, checksum = fingerprint(rows)
    assert 1.9 * num_bytes < read < 2.4 * num_bytes
    with open(f"{output_dir}/plan.json", encoding="utf-8") as file:
        (described,) = json.load(file)["inputs"]
    assert described == {"path": rows, "bytes": num_bytes, "checksum": checksum}


@pytest.mark.parametrize("num_bytes", [0, 1, 17, 1 << 16])
def test_the_checksum_of_parts_is_that_of_the_whole(num_bytes):
    generator = random.Random(num_bytes)
    data = generator.randbytes(num_bytes)
    bounds = [0, *sorted(generator.randrange(num_bytes + 1) for _ in range(5)), num_bytes]
    whole = Extent()
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = Extent(start, start, num_rows=1)
        part.add(data[start:end])
        whole.join(part)
    assert whole.fingerprint == (num_bytes, f"{google_crc32c.value(data):08x}")
    assert whole.num_rows == 6


@pytest.mark.parametrize("range_bytes", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n\n\n"])
def test_ranges_cut_at_any_byte_have_every_line_once(tmp_path, range_bytes, ending):
    path = tmp_path / "rows.txt"
    lines = [b"line %d" % number * (number % 9) for number in range(40)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + ending)
    whole, texts = Extent(), []
    for row_range in cut_bytes(str(path), "rows.txt", path.stat().st_size, range_bytes):
        extent = Extent()
        texts += [
            row.text
            for row in line_format(row_range.path).read_extent(row_range, Columns(), extent)
        ]
        whole.join(extent)
    assert texts == [line.decode() for line in lines if line]
    (planned,) = plan_row_ranges(str(path), 1000)
    assert (whole.start, whole.end, whole.num_rows) == (0, planned.end, planned.num_rows)
    assert whole.fingerprint == fingerprint(str(path))


def test_a_line_over_several_ranges_belongs_to_the_first(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"first\n" + b"x" * (MAX_LINE_BYTES + 1) + b"\nlast\n")
    extents = []
    for row_range in cut_bytes(str(path), "rows.txt", path.stat().st_size, 10 << 20):
        extents.append(Extent())
        list(line_format(row_range.path).read_extent(row_range, Columns(), extents[-1]))
    assert [extent.num_rows for extent in extents] == [2, 0, 0, 1]
    whole = Extent()
    for extent in extents:
        whole.join(extent)
    assert whole.fingerprint == fingerprint(str(path))


def test_a_file_that_shrinks_while_it_is_scanned_is_refused(rows, tmp_path, monkeypatch):
    class ShrinkingPool(PoolOfThisProcess):
        def map(self, function, /, *arguments):
            for number, task in enumerate(zip(*arguments, strict=True)):
                if number == 2:
                    with open(rows, "rb+") as file:
                        lines = file.readlines()
                        file.seek(0)
                        file.writelines(lines[1:])
                        file.truncate()
                yield function(*task)

    monkeypatch.setattr(prepare, "process_pool", lambda _: contextlib.nullcontext(ShrinkingPool()))
    monkeypatch.setattr(corpus, "_range_bytes", lambda _: 1 << 17)
    with pytest.raises(UserError, match="rows.jsonl: changed while it was read"):
        prepare.run(config(rows, tmp_path / "data", vocab_size=200, max_rejected=10))


def test_shards_do_not_depend_on_ranges_and_rounds(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare, "process_pool", lambda _: contextlib.nullcontext(PoolOfThisProcess())
    )
    monkeypatch.setattr(corpus, "VOCABULARY_TEXTS", 500)
    contents = []
    for range_bytes, first_round in ((1 << 30, 64), (20_000, 2)):
        monkeypatch.setattr(corpus, "_range_bytes", lambda _, size=range_bytes: size)
        monkeypatch.setattr(corpus, "_RANGES_OF_FIRST_ROUND", first_round)
        data_dir = tmp_path / str(range_bytes)
        flags = {"vocab_size": 300, "max_rejected": 10}
        prepare.run(config(rows, data_dir, split="train:0.5,test:0.5", **flags))
        paths = sorted(path for path in data_dir.rglob("*") if path.is_file())
        contents.append({str(path.relative_to(data_dir)): path.read_bytes() for path in paths})
    assert len(contents[0]) > 8
    assert contents[0] == contents[1]
