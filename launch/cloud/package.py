"""What a job's machines install: the project's own wheel and the locked requirements.

The wheel is built from the source that this command runs from, or packed from the installed files:
a job runs what its user sees. Its bytes depend on the source alone. Their SHA-256 is part of its
name in the job's folder, and the job's machines compare it with that of their download.
"""

import base64
import functools
import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job, StoredFile
from trainer.errors import UserError
from trainer.storage import gcs

_ROOT = Path(__file__).parents[2]
_SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "launch", "trainer")
_REQUIREMENTS = "requirements"
# 1980, the earliest time that a ZIP archive can hold.
_EPOCH_SECONDS = "315532800"
_EPOCH = (1980, 1, 1, 0, 0, 0)
# What installers add to a wheel's files.
_OF_INSTALLERS = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json")
_BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_wheel(sys.argv[1]))
"""


@dataclass(frozen=True)
class Package:
    """A package's files: their entries in the job's record, and their bytes by name."""

    wheel: StoredFile
    requirements: StoredFile
    contents: dict[str, bytes]


def build(environment: str) -> Package:
    """The package for an environment of requirements/, such as `tpu`; raises as its parts."""
    name, wheel = build_wheel()
    requirements = read_requirements(environment)
    stored = [
        StoredFile(f"{digest[:16]}/{base}", len(data), digest)
        for base, data in ((name, wheel), (f"{environment}.txt", requirements))
        for digest in [hashlib.sha256(data).hexdigest()]
    ]
    contents = {stored[0].name: wheel, stored[1].name: requirements}
    return Package(stored[0], stored[1], contents)


def upload(job: Job, package: Package) -> None:
    """Uploads a package to a job's folder; OSError or RunAgain if the store fails."""
    for name, data in package.contents.items():
        url = f"{job.folder}/package/{name}"
        try:
            gcs.upload(url, data, if_generation=0)
        except gcs.Taken:
            # Usually the same file, as its name has the SHA-256, but somebody may have replaced it.
            gcs.upload(url, data)


def read_requirements(environment: str) -> bytes:
    """The locked requirements of an environment; UserError if this installation lacks them."""
    for folder in (_ROOT / _REQUIREMENTS, Path(__file__).parents[1] / _REQUIREMENTS):
        path = folder / f"{environment}.txt"
        if path.exists():
            return path.read_bytes()
    raise UserError(
        f"{_REQUIREMENTS}/{environment}.txt: not found beside this installation of Multihot; "
        "install it from a clone: pip install ."
    )


@functools.cache
def build_wheel() -> tuple[str, bytes]:
    """File name and bytes of the project's wheel; UserError if it cannot be built here."""
    if (_ROOT / "setup.py").exists():
        return _build_from_source()
    return _collect_installed()


def _build_from_source() -> tuple[str, bytes]:
    """The wheel of a clone; built from a copy, so that the clone stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "wheel"
        target.mkdir()
        for name in (*_SOURCES, _REQUIREMENTS):
            path = _ROOT / name
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(path, source / name, ignore=ignored)
            elif path.exists():
                source.mkdir(exist_ok=True)
                shutil.copy(path, source / name)
        process = subprocess.run(
            [sys.executable, "-c", _BUILD, str(target)],
            cwd=source,
            env=os.environ | {"SOURCE_DATE_EPOCH": _EPOCH_SECONDS},
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{_ROOT}: building the wheel failed: {reason}; setuptools of this Python has to "
                "be 77 or newer: pip install --upgrade setuptools"
            )
        (path,) = target.glob("*.whl")
        return path.name, _normalize(path.read_bytes())


def _normalize(wheel: bytes) -> bytes:
    """A wheel without what depends on the clone: the order and permissions of its files."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return _pack({name: archive.read(name) for name in archive.namelist()})


def _pack(files: dict[str, bytes]) -> bytes:
    """A ZIP archive whose bytes depend on the files alone; RECORD is last, as in all wheels."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(files, key=lambda name: (name.endswith("/RECORD"), name)):
            item = zipfile.ZipInfo(name, _EPOCH)
            item.compress_type = zipfile.ZIP_DEFLATED
            item.external_attr = 0o644 << 16
            archive.writestr(item, files[name])
    return stream.getvalue()


def _collect_installed() -> tuple[str, bytes]:
    """The wheel that this installation came from, packed from the installed files."""
    distribution = importlib.metadata.distribution("multihot")
    files = {}
    for path in distribution.files or ():
        inside = not path.is_absolute() and ".." not in path.parts
        if inside and path.suffix != ".pyc" and path.name not in _OF_INSTALLERS:
            files[path.as_posix()] = path.read_binary()
    record = next(
        (name.replace("/METADATA", "/RECORD") for name in files if name.endswith("/METADATA")), None
    )
    if record is None or "launch/cloud/package.py" not in files:
        raise UserError(
            "this installation of Multihot lacks its files; install it from a clone: pip install ."
        )
    lines = []
    for name, data in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    return f"multihot-{distribution.version}-py3-none-any.whl", _pack(files)
