"""Labels of whole corpora: the same in every format, by one rule a column, counted and told."""

import csv
import json
import unicodedata

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import config, read_split, write_rows
from tf_examples import example, write_records

from trainer import prepare
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import train_tokenizer
from trainer.errors import UserError

WORDS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer([f"text number {i}" for i in range(100)], 200).save(folder)
    return folder


@pytest.fixture
def run(tmp_path, tokenizer_dir):
    """Prepares a file; returns the labels of each id, and the metadata."""

    def run(path, name="data", **flags):
        flags = {"tokenizer": tokenizer_dir, "split": "train", "min_label_count": 1} | flags
        folder = str(tmp_path / name)
        prepare.run(config(path, folder, **flags))
        metadata = load_metadata(folder)
        rows = read_split(folder, flags["split"])
        return {
            name: [metadata.labels[place] for place in places] for name, _, places in rows
        }, metadata

    return run


def write_labels(tmp_path, names):
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return str(path)


def write_table(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text", "labels"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {
    "rows.jsonl": write_rows,
    "rows.csv": write_table,
    "rows.tsv": lambda path, rows: write_table(path, rows, "\t"),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "rows.arrow": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "rows.tfrecord": lambda path, rows: write_records(path, [example(**row) for row in rows]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_string_of_labels_is_read_the_same_in_every_format(tmp_path, run, name):
    values = ["a,b", "", "b", " a , ,b ", '["b", "c, d"]', "<a><b>", "tensor([1., 0.])", "{a,b}"]
    rows = [
        {"id": f"r{i}", "text": f"text number {i}", "labels": value}
        for i, value in enumerate(values)
    ]
    WRITERS[name](tmp_path / name, rows)
    labels, _ = run(tmp_path / name, max_rejected=1.0)
    assert labels == {
        "r0": ["a", "b"], "r1": [], "r2": ["b"], "r3": ["a", "b"], "r4": ["b", "c, d"],
        "r5": ["a", "b"], "r7": ["a", "b"],
    }  # fmt: skip
    (rejected,) = (tmp_path / "data" / "rejected" / "train.jsonl").read_text().splitlines()
    assert "labels are numbers" in rejected


@pytest.mark.parametrize("name", WRITERS)
def test_digits_outside_a_list_of_codes_are_unknown_in_every_format(tmp_path, run, name):
    codes = ["428.0", "V45", "0042", *(f"C{i:02d}" for i in range(50))]
    values = ["428.0;V45", "042", "40", "17", "40;45", "0042"]
    rows = [
        {"id": f"r{i}", "text": f"text number {i}", "labels": value}
        for i, value in enumerate(values)
    ]
    WRITERS[name](tmp_path / name, rows)
    flags = {"labels": write_labels(tmp_path, codes), "label_delimiter": ";"}
    with pytest.raises(UserError, match="4 of 6 rows cannot be used"):
        run(tmp_path / name, **flags)
    labels, _ = run(tmp_path / name, max_rejected=4.0, **flags)
    assert labels == {"r0": ["428.0", "V45"], "r5": ["0042"]}
    rejected = (tmp_path / "data" / "rejected" / "train.jsonl").read_text().splitlines()
    assert all("unknown label" in line for line in rejected) and len(rejected) == 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_strings_are_ids_only_if_all_of_the_column_are_numbers(tmp_path, run, num_workers):
    """One name at the end of two megabytes is enough; then no number was an id before it either."""
    filler = "word " * 200
    rows = [{"id": f"r{i}", "text": f"{i} {filler}", "labels": str(i % 4)} for i in range(2000)]
    flags = {"labels": write_labels(tmp_path, WORDS), "num_workers": num_workers}
    labels, metadata = run(write_rows(tmp_path / "ids.jsonl", rows), **flags)
    assert all(labels[f"r{i}"] == [WORDS[i % 4]] for i in range(2000))
    rows[-1]["labels"] = "black"
    path = write_rows(tmp_path / "names.jsonl", rows)
    with pytest.raises(
        UserError, match="row 0: unknown label '0'; digits are an id only with --labels"
    ):
        run(path, "refused", **flags)
    labels, _ = run(path, "names", max_rejected=2000.0, **flags)
    assert labels == {"r1999": ["black"]}
    labels, _ = run(path, "said", max_rejected=1.0, label_kind="ids", **flags)
    assert len(labels) == 1999 and labels["r3"] == ["black"]


def test_a_later_split_has_ids_where_the_first_one_had_a_list(tmp_path, run):
    listed = write_labels(tmp_path, WORDS)
    rows = [{"id": f"r{i}", "text": f"text number {i}", "labels": str(i % 4)} for i in range(8)]
    path = write_rows(tmp_path / "ids.jsonl", rows)
    run(path, labels=listed)
    labels, _ = run(path, split="test")
    assert [labels[f"r{i}"] for i in range(4)] == [[word] for word in WORDS]
    named = [row | {"labels": WORDS[i % 4]} for i, row in enumerate(rows)]
    run(write_rows(tmp_path / "names.jsonl", named), "names")
    with pytest.raises(UserError, match="unknown label '0'; digits are an id only with --labels"):
        run(path, "names", split="test")


def spellings():
    """20 spellings of 7 names."""
    names = ["Billing", "caf\u00e9", "Stra\u00dfe", "r\u00e9sum\u00e9", "Ada", "\u00c5ngstr\u00f6m"]
    found = {
        form
        for name in names
        for form in (name, name.lower(), f" {name}", unicodedata.normalize("NFD", name))
    }
    return sorted(found | {"seventh"})


def test_spellings_of_one_name_are_told_and_can_be_made_one(tmp_path, run, capsys):
    names = spellings()
    assert len(names) == 20
    rows = [
        {"id": f"r{i}", "text": f"text number {i}", "labels": [name]}
        for i, name in enumerate(names)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    _, metadata = run(path)
    assert len(metadata.labels) == 20
    (warning,) = (line for line in metadata.checks["warnings"] if "differ only in case" in line)
    assert "6 in 19 spellings" in warning and "--normalize_labels=strip,casefold,nfc" in warning
    assert f"warning: {warning}" in capsys.readouterr().out
    _, metadata = run(path, "one", normalize_labels=("strip", "casefold", "nfc"))
    assert len(metadata.labels) == 7 and "billing" in metadata.labels
    assert not any("differ only" in line for line in metadata.checks["warnings"])
    listed = write_labels(tmp_path, ["Billing", "caf\u00e9", "stra\u00dfe"])
    labels, metadata = run(
        path, "listed", labels=listed, normalize_labels=("strip", "casefold", "nfc"),
        unknown_labels="ignore",
    )  # fmt: skip
    assert metadata.labels == ("Billing", "caf\u00e9", "stra\u00dfe")
    assert sum(map(len, labels.values())) == sum(
        " ".join(unicodedata.normalize("NFC", name).casefold().split())
        in ("billing", "caf\u00e9", "strasse")
        for name in names
    )


def test_names_that_look_cut_or_missing_are_told(tmp_path, run):
    names = ["tensor([0.", "dtype=object)", "nan", "whole", "f(x)", "Alzheimer's"]
    rows = [{"text": f"text number {i}", "labels": [name]} for i, name in enumerate(names)]
    _, metadata = run(write_rows(tmp_path / "rows.jsonl", rows))
    (warning,) = (line for line in metadata.checks["warnings"] if "part of a list" in line)
    assert "missing value: 3 ('dtype=object)' 1, 'nan' 1, 'tensor([0.' 1)" in warning


@pytest.mark.parametrize(
    "values, expected",
    [
        (["a;b", "a", "b", "b;a"], "several side by side: 2 ('a;b' 1, 'b;a' 1)"),
        (["0,1,0", "1,1,0"], "truth values and no names: '0' 2, '1' 2"),
        (["True", "False"], "truth values and no names: 'False' 1, 'True' 1"),
        (["a b", "a c", "b c", "a b c", "c a", "b a", "c b"], "several side by side: 7 ("),
        (["b|", "data", "science", "data science"], ""),
        (["a;", ";", "a"], "several side by side: 2 (';' 1, 'a;' 1)"),
        ([["a,b"], "a,b"], "several side by side: 1 ('a,b' 1)"),
        ([True, "red"], "truth values beside names: 'labels' 1"),
        (["a", ["['a', 'b']"]], "part of a list or a missing value: 1"),
        (["a", ["a\0"]], "part of a list or a missing value: 1"),
    ],
)
def test_strings_that_were_not_taken_apart_are_told(tmp_path, run, values, expected):
    rows = [{"text": f"text number {i}", "labels": value} for i, value in enumerate(values)]
    _, metadata = run(write_rows(tmp_path / "rows.jsonl", rows))
    warnings = " ".join(metadata.checks["warnings"])
    assert expected in warnings and ("side by side" in warnings) == ("side by side" in expected)


def test_a_split_with_unknown_labels(tmp_path, run, capsys):
    rows = [
        {"id": f"r{i}", "text": f"text number {i}", "labels": [WORDS[i % 4]]} for i in range(40)
    ]
    run(write_rows(tmp_path / "train.jsonl", rows))
    rows = [
        {"id": "t0", "text": "text 0", "labels": ["red", "pink"]},
        {"id": "t1", "text": "text 1", "labels": ["pink", "40"]},
        {"id": "t2", "text": "text 2", "labels": "blue"},
    ]
    path = write_rows(tmp_path / "test.jsonl", rows)
    with pytest.raises(UserError, match="unknown label .pink.; .*--unknown_labels=ignore"):
        run(path, split="test")
    capsys.readouterr()
    labels, metadata = run(path, split="test", unknown_labels="ignore")
    assert labels == {"t0": ["red"], "t1": [], "t2": ["blue"]}
    assert metadata.source["calls"][-1]["unknown_labels"] == {"40": 1, "pink": 2}
    assert metadata.labels == tuple(sorted(WORDS)) and metadata.dropped_labels == {}
    expected = "not in the list and are ignored: 2, on 3 places ('pink' 2, '40' 1)"
    assert expected in metadata.checks["warnings"][-1] and expected in capsys.readouterr().out


def class_columns(classes):
    features = {"text": datasets.Value("string"), "id": datasets.Value("string")}
    features |= {name: datasets.ClassLabel(names=classes) for name in ("toxic", "spam")}
    values = {"toxic": [0, 1, 1], "spam": [1, 0, 1]}
    values |= {"text": [f"text {i}" for i in range(3)], "id": list("abc")}
    return datasets.Dataset.from_dict(values, datasets.Features(features))


@pytest.mark.parametrize("classes", [["no", "yes"], ["0", "1"], ["neg", "pos"], ["clean", "bad"]])
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_the_second_of_two_classes_is_the_positive(tmp_path, run, classes, kind):
    path = tmp_path / "rows.parquet"
    data = class_columns(classes)
    data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    labels, _ = run(path, label_field=("toxic", "spam"))
    assert labels == {"a": ["spam"], "b": ["toxic"], "c": ["toxic", "spam"]}
    frame = data.to_pandas().set_index("id")
    for name, found in labels.items():
        assert sorted(found) == [c for c in ("spam", "toxic") if frame.loc[name, c] == 1]


@pytest.mark.parametrize(
    "classes",
    [["yes", "no"], ["a", "b", "c"], ["pos", "neg"], ["toxic", "non-toxic"], ["1", "0"]],
)
def test_classes_that_are_no_yes_and_no_are_refused(tmp_path, run, classes):
    class_columns(classes).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="column 'toxic' has the classes .*, expected two"):
        run(tmp_path / "rows.parquet", label_field=("toxic", "spam"))


@pytest.mark.parametrize("kind", ["rows.parquet", "folder"])
def test_a_class_is_one_name_whatever_it_holds(tmp_path, run, kind):
    classes = ["a, b", "[c]", "<d>", "e"]
    features = {"id": datasets.Value("string"), "text": datasets.Value("string")}
    features["labels"] = datasets.ClassLabel(names=classes)
    values = {"id": list("pqrst"), "text": [f"text {i}" for i in range(5)]}
    data = datasets.Dataset.from_dict(
        values | {"labels": [0, 1, 2, 3, -1]}, datasets.Features(features)
    )
    path = tmp_path / kind
    data.to_parquet(path) if kind == "rows.parquet" else data.save_to_disk(path)
    labels, _ = run(path, max_rejected=0.5)
    assert labels == {name: [found] for name, found in zip("pqrs", classes, strict=True)}


def test_a_later_split_has_a_column_for_every_label(tmp_path, run):
    rows = [{"text": f"text {i}", "x": i % 2, "y": 1 - i % 2} for i in range(4)]
    run(write_rows(tmp_path / "rows.jsonl", rows), label_field=("x", "y"))
    rows = [{"id": "r", "text": "text 9", "x": 1, "z": 1, "y": 0}]
    path = write_rows(tmp_path / "more.jsonl", rows)
    with pytest.raises(UserError, match=r"other labels than --label_field names \(y, z\)"):
        run(path, split="test", label_field=("z", "x"))
    with pytest.raises(UserError, match=r"--label_field names \(z\)"):
        run(path, split="test", label_field=("z", "y", "x"))
    labels, _ = run(path, split="test", label_field=("z", "y", "x"), unknown_labels="ignore")
    assert labels == {"r": ["x"]}


def test_digits_of_a_later_split_are_no_places_among_names_of_the_first(tmp_path, run):
    rows = [{"text": f"text {i}", "labels": [f"code{i}"]} for i in range(4)]
    run(write_rows(tmp_path / "rows.jsonl", rows))
    rows = [{"id": f"r{i}", "text": f"text 9{i}", "labels": str(i)} for i in (1, 2)]
    path = write_rows(tmp_path / "more.jsonl", rows)
    with pytest.raises(UserError, match="unknown label '1'; digits are an id only .*--label_kind"):
        run(path, split="test")
    labels, _ = run(path, split="test", label_kind="ids")
    assert labels == {"r1": ["code1"], "r2": ["code2"]}
    listed = write_labels(tmp_path, [f"code{i}" for i in range(4)])
    assert run(path, split="more", labels=listed)[0] == labels


@pytest.mark.parametrize("kind", ["ids", "multi_hot"])
def test_numbers_that_stand_for_names_need_these_names(tmp_path, run, kind):
    rows = [{"text": f"text {i}", "labels": "1,0"} for i in range(4)]
    with pytest.raises(UserError, match=f"--label_kind={kind}: expected the names .*--labels"):
        run(write_rows(tmp_path / "rows.jsonl", rows), label_kind=kind)


def test_a_list_of_labels_that_is_read_wrongly_is_shown(tmp_path, run):
    rows = [{"text": f"text {i}", "labels": ["x"]} for i in range(4)]
    listed = write_labels(tmp_path, ['["x", "y"]'])
    with pytest.raises(UserError, match="or correct the list of labels .*x.*, y|x.*y") as caught:
        run(write_rows(tmp_path / "rows.jsonl", rows), labels=listed)
    assert "\n" not in str(caught.value)


def test_a_label_name_of_64_kibibytes_is_one_line(tmp_path, run):
    rows = [{"text": f"text number {i}", "labels": ["a", "n" * 2**16]} for i in range(9)]
    with pytest.raises(UserError, match="of 65,536 characters, expected at most 1,024") as caught:
        run(write_rows(tmp_path / "rows.jsonl", rows))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    listed = write_labels(tmp_path, ["a", "n" * 2**16])
    with pytest.raises(UserError, match="line 2: label .* of 65,536 characters"):
        run(write_rows(tmp_path / "rows.jsonl", [json.loads(json.dumps(rows[0]))]), labels=listed)
