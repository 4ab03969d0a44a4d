"""Classes and functions of Python sources, and the labels that their code earns them."""

import ast
import gzip
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from trainer.errors import UserError
from trainer.runtime.progress import show_progress
from trainer.runtime.workers import process_pool

PREFIX = "sample:docstrings"
MIN_WORDS, MAX_WORDS = 8, 550
# Label of the package, and the distributions that may hold it: the first one installed is read.
PACKAGES = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-tpu"),
    "transformers": ("transformers",), "keras": ("keras",), "numpy": ("numpy",),
    "tensorflow_datasets": ("tensorflow-datasets",),
    "google_cloud_storage": ("google-cloud-storage",), "huggingface_hub": ("huggingface-hub",),
    "google_auth": ("google-auth",), "google_api_core": ("google-api-core",),
    "tensorboard": ("tensorboard",), "werkzeug": ("werkzeug",), "grpc": ("grpcio",),
    "fsspec": ("fsspec",), "protobuf": ("protobuf",), "absl": ("absl-py",), "h5py": ("h5py",),
    "pyarrow": ("pyarrow",), "tqdm": ("tqdm",), "tokenizers": ("tokenizers",),
    "safetensors": ("safetensors",),
}  # fmt: skip
_FILES_A_TASK = 8


@dataclass(frozen=True)
class SampleSummary:
    """What a sample is made of. `fingerprint` is the SHA-256 (hex) of its lines."""

    documents: int
    seed: int
    versions: dict[str, str]
    fingerprint: str


@dataclass(frozen=True)
class SourceFile:
    """A Python file: where it lies, its name inside the installation, its package's label."""

    path: str
    name: str
    package: str


def list_source_files(seed: int) -> tuple[list[SourceFile], dict[str, str]]:
    """The packages' sources in a seeded order, and the versions; a UserError if there are none."""
    files, versions = [], {}
    for package, candidates in PACKAGES.items():
        for distribution_name in candidates:
            try:
                distribution = importlib.metadata.distribution(distribution_name)
            except importlib.metadata.PackageNotFoundError:
                continue
            versions[distribution_name] = distribution.version
            for entry in distribution.files or []:
                if entry.suffix == ".py":
                    path = str(distribution.locate_file(entry))
                    files.append(SourceFile(path, entry.as_posix(), package))
            break
    if not files:
        raise UserError(f"{PREFIX}: none of {', '.join(PACKAGES)} is installed with its sources")
    files.sort(key=lambda file: (hash_name(seed, file.name), file.name))
    return files, versions


def hash_name(seed: int, name: str) -> bytes:
    """A hash that orders names the same way on every machine."""
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()


def read_documents(files: list[SourceFile]) -> list[list[dict]]:
    """For each file its documents in order: id, text, labels; package and kind, to slice by."""
    warnings.simplefilter("ignore")  # Other people's invalid escapes are not news here.
    return [list(_documents_of_file(file)) for file in files]


def _documents_of_file(file: SourceFile) -> Iterator[dict]:
    try:
        with open(file.path, "rb") as source:
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node, parents in find_definitions(tree, ()):
        text = ast.get_docstring(node)
        if text is None or not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            continue
        try:
            text.encode()
        except UnicodeEncodeError:
            continue
        name = ".".join(parent.name for parent in (*parents, node))
        labels = [f"package:{file.package}", *describe(node, parents)]
        document = {"id": f"{file.name}:{node.lineno}:{name}", "text": text, "labels": labels}
        kind = next(label for label in ("class", "method", "function") if label in labels)
        yield document | {"package": file.package, "kind": kind}


def iterate_sample(
    files: list[SourceFile], num_documents: int | None, num_workers: int | None
) -> Iterator[dict]:
    """Streams documents of distinct text in the files' order, whatever `num_workers` is."""
    seen: set[bytes] = set()
    tasks = [files[at : at + _FILES_A_TASK] for at in range(0, len(files), _FILES_A_TASK)]
    with process_pool(num_workers) as pool:
        for documents_of_files in pool.map(read_documents, tasks):
            for document in (item for documents in documents_of_files for item in documents):
                digest = hashlib.blake2b(document["text"].encode(), digest_size=16).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                yield document
                if len(seen) == num_documents:
                    return


def write_sample(
    path: str,
    num_documents: int | None,
    seed: int,
    num_workers: int | None = None,
    progress: str = "auto",
) -> SampleSummary:
    """Writes the sample as JSONL (`id`, `text`, `labels`, `package`, `kind`), atomically.

    A UserError says that the installed packages hold fewer documents than asked for.
    """
    files, versions = list_source_files(seed)
    digest = hashlib.sha256()
    documents = 0
    temporary = f"{path}.tmp"
    try:
        with (
            open(temporary, "wb") as raw,
            _writer(path, raw) as output,
            show_progress(progress, "sample", num_documents, "documents") as shown,
        ):
            for document in iterate_sample(files, num_documents, num_workers):
                line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                output.write(line)
                documents += 1
                shown.update()
        if num_documents is not None and documents < num_documents:
            raise UserError(
                f"{PREFIX}: the installed packages hold {documents} documents, fewer than the "
                f"{num_documents} asked for; ask for fewer, or leave the number out"
            )
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return SampleSummary(documents, seed, versions, digest.hexdigest())


def _writer(path: str, raw: BinaryIO) -> BinaryIO | gzip.GzipFile:
    """A file to write lines to, compressed without a time stamp if the name asks for it."""
    return gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.endswith(".gz") else raw


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find_definitions(
    node: ast.AST, parents: tuple[Definition, ...]
) -> Iterator[tuple[Definition, tuple[Definition, ...]]]:
    """Every class and function below a node, in source order, with those it lies in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, parents
            yield from find_definitions(child, (*parents, child))
        elif not isinstance(child, ast.expr):
            yield from find_definitions(child, parents)


def describe(node: Definition, parents: tuple[Definition, ...]) -> list[str]:
    """The labels of a class or function, from its code alone."""
    decorators = {_last_name(decorator) for decorator in node.decorator_list}
    own = list(_own_nodes(node))
    calls = [item for item in own if isinstance(item, ast.Call)]
    facts = {
        "private": node.name.startswith("_") and not node.name.endswith("__"),
        "deprecated": any("deprecat" in name.lower() for name in decorators)
        or any("DeprecationWarning" in _names(call) for call in calls),
        "warns": any(_last_name(call) in ("warn", "warning", "warn_explicit") for call in calls),
    }
    if isinstance(node, ast.ClassDef):
        facts |= _class_facts(node)
    else:
        facts |= _function_facts(node, parents, decorators, own)
    return [label for label, holds in facts.items() if holds]


def _class_facts(node: ast.ClassDef) -> dict[str, bool]:
    bases = {_last_name(base) for base in node.bases}
    bases |= {_last_name(keyword.value) for keyword in node.keywords}
    methods = [item for item in node.body if isinstance(item, Definition)]
    names = {method.name for method in methods}
    return {
        "class": True,
        "abstract": bool(bases & {"ABC", "ABCMeta"}) or any(map(_is_abstract, methods)),
        "context_manager": "__enter__" in names or "__aenter__" in names,
        "exception": any(base.endswith(("Error", "Exception", "Warning")) for base in bases),
        "dataclass": any(_last_name(item) == "dataclass" for item in node.decorator_list),
    }


def _function_facts(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    parents: tuple[Definition, ...],
    decorators: set[str],
    own: list[ast.AST],
) -> dict[str, bool]:
    in_class = bool(parents) and isinstance(parents[-1], ast.ClassDef)
    return {
        "method": in_class,
        "function": not in_class,
        "async": isinstance(node, ast.AsyncFunctionDef),
        "raises": any(isinstance(item, ast.Raise) for item in own),
        "returns": any(isinstance(item, ast.Return) and item.value is not None for item in own),
        "generator": any(isinstance(item, ast.Yield | ast.YieldFrom) for item in own),
        "variadic": bool(node.args.vararg or node.args.kwarg),
        "property": any("property" in name for name in decorators) or "setter" in decorators,
        "classmethod": "classmethod" in decorators,
        "staticmethod": "staticmethod" in decorators,
        "abstract": _is_abstract(node),
        "context_manager": any("contextmanager" in name for name in decorators)
        or node.name in ("__enter__", "__exit__", "__aenter__", "__aexit__"),
    }


def _is_abstract(node: Definition) -> bool:
    return any("abstract" in _last_name(item).lower() for item in node.decorator_list)


def _own_nodes(node: Definition) -> Iterator[ast.AST]:
    """The nodes of a body, those of classes and functions inside it left out."""
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Definition | ast.Lambda):
            continue
        yield item
        waiting.extend(ast.iter_child_nodes(item))


def _last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, `c(...)` and `a.c(...)`; empty for other expressions."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _names(call: ast.Call) -> set[str]:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return {_last_name(value) for value in values}
