"""The sample: labels from the code, the same documents for any number of processes."""

import ast
import json
import textwrap

import pytest

from trainer import sample
from trainer.config import SampleConfig
from trainer.errors import UserError
from trainer.sources import docstrings

MODULE = '''
@dataclasses.dataclass
class _Base(abc.ABC):
    """A private abstract base class of all the things here."""

    def __enter__(self): ...

    @abc.abstractmethod
    def run(self, *arguments):
        """Runs whatever has to be run, with all of its arguments."""
        raise NotImplementedError

    @property
    def size(self):
        """How large this thing is, counted in units of itself."""
        return 1

    @classmethod
    def make(cls):
        """Makes a new one, out of nothing but its own class."""
        def inner():
            """An inner function, whose body is nobody's but its own."""
            raise ValueError
        warnings.warn("old", DeprecationWarning)

    @staticmethod
    async def wait():
        """Waits for as long as it takes to be done waiting."""
        yield 1

class BadError(Exception):
    """Raised when something has gone wrong beyond all repair here."""

@contextlib.contextmanager
@deprecated("no more")
def opened(**options):
    """Opens it, lets you work with it, and closes it again."""
    yield

def short():
    """Too short to count."""
'''
EXPECTED = {
    "_Base": {"private", "class", "abstract", "context_manager", "dataclass"},
    "_Base.run": {"method", "abstract", "variadic", "raises"},
    "_Base.size": {"method", "property", "returns"},
    "_Base.make": {"method", "classmethod", "warns", "deprecated"},
    "_Base.make.inner": {"function", "raises"},
    "_Base.wait": {"method", "staticmethod", "async", "generator"},
    "BadError": {"class", "exception"},
    "opened": {"function", "context_manager", "deprecated", "generator", "variadic"},
}


def test_labels_come_from_the_code_around_a_docstring(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(textwrap.dedent(MODULE))
    (documents,) = docstrings.read_documents([docstrings.SourceFile(str(path), "p/module.py", "p")])
    found = {document["id"].split(":")[-1]: set(document["labels"]) for document in documents}
    assert found == {name: labels | {"package:p"} for name, labels in EXPECTED.items()}
    first = ast.parse(MODULE).body[0]
    assert documents[0]["text"] == ast.get_docstring(first)
    assert documents[0]["id"] == "p/module.py:3:_Base"
    # To slice by.
    assert {document["package"] for document in documents} == {"p"}
    kinds = {document["id"].split(":")[-1]: document["kind"] for document in documents}
    assert kinds.items() >= {
        ("_Base", "class"), ("_Base.run", "method"), ("_Base.make.inner", "function"),
    }  # fmt: skip
    assert all(kinds[name] in labels for name, labels in EXPECTED.items())


def test_a_file_that_is_no_python_is_passed_over(tmp_path):
    path = tmp_path / "module.py"
    path.write_bytes(b"def \x00(")
    assert docstrings.read_documents([docstrings.SourceFile(str(path), "x.py", "x")]) == [[]]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "two.jsonl"
    summary = docstrings.write_sample(str(path), 1000, seed=17, num_workers=2)
    return path, summary, [json.loads(line) for line in path.read_text().splitlines()]


def test_the_sample_is_the_same_for_any_number_of_processes(documents, tmp_path):
    path, summary, _ = documents
    alone = tmp_path / "one.jsonl"
    assert docstrings.write_sample(str(alone), 1000, seed=17, num_workers=1) == summary
    assert alone.read_bytes() == path.read_bytes()
    other = tmp_path / "other.jsonl"
    assert (
        docstrings.write_sample(str(other), 1000, seed=18, num_workers=2).fingerprint
        != summary.fingerprint
    )


def test_the_sample_is_ragged_skewed_and_without_repetition(documents):
    _, summary, rows = documents
    words = [len(row["text"].split()) for row in rows]
    assert len(rows) == summary.documents == 1000
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == 1000
    assert min(words) == 8 and 300 < max(words) <= 550
    labels = {label for row in rows for label in row["labels"]}
    assert 30 <= len(labels) <= 40
    shares = {label: sum(label in row["labels"] for row in rows) / 1000 for label in labels}
    assert max(shares.values()) > 0.5
    assert min(shares.values()) <= 0.001
    assert all("package:" in " ".join(row["labels"]) for row in rows)
    assert "transformers" in summary.versions and len(summary.fingerprint) == 64


def test_a_smaller_sample_is_the_beginning_of_a_larger_one(documents, tmp_path):
    path, _, _ = documents
    smaller = tmp_path / "smaller.jsonl"
    docstrings.write_sample(str(smaller), 100, seed=17)
    assert path.read_bytes().startswith(smaller.read_bytes())


def test_asking_for_too_many_documents_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", {"absl": ("absl-py",)})
    with pytest.raises(UserError, match="fewer than the 5000 asked for"):
        docstrings.write_sample(str(tmp_path / "x.jsonl"), 5000, seed=17, num_workers=1)
    assert list(tmp_path.iterdir()) == []


def test_the_command_records_what_the_sample_is_made_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docstrings, "PACKAGES", {"absl": ("absl-py",)})
    path = tmp_path / "x.jsonl.gz"
    sample.run(SampleConfig(output=str(path), num_documents=50))
    first = path.read_bytes()
    about = json.loads((tmp_path / "x.jsonl.gz.about").read_text())
    assert (about["documents"], about["seed"]) == (50, 17)
    assert list(about["versions"]) == ["absl-py"]
    assert about["fingerprint"] in capsys.readouterr().out
    sample.run(SampleConfig(output=str(path), num_documents=50))
    assert path.read_bytes() == first


def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        sample.run(SampleConfig(output=str(tmp_path / "file" / "x.jsonl"), num_documents=5))
    assert "\n" not in str(caught.value)
