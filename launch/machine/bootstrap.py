"""Installs a job's package on the machine that is to run the job, and starts the job.

    python3 bootstrap.py JOB_FILE WORK_DIR [FLAGS OF launch.machine.node ...]

JOB_FILE is a job's record (launch/job.py); `-` stands for the text in $MULTIHOT_JOB. This file uses
only the standard library of Python 3.8 or newer, because Multihot is not installed yet. A second
run in the same WORK_DIR uses what the first one installed. MULTIHOT_PYTHON_URL names an archive of
the Python to use (`--python_url`). GCE_METADATA_HOST and STORAGE_EMULATOR_HOST name other servers,
MULTIHOT_SITE_PACKAGES a folder of installed dependencies to use, and MULTIHOT_SPEED is how much
shorter the pauses are.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from typing import NoReturn

PYTHONS = ("python3.11", "python3.12", "python3.13", "python3")
FIELDS = ("name", "sha256")
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0
SPEED = float(os.environ.get("MULTIHOT_SPEED", "1"))
# For one command, with its repetitions.
INSTALL_SECONDS = 900.0
IS_FIT = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
# The wheel of uv 0.13.9 for Linux on x86-64. It needs no pip, which an image may lack.
UV_URL = (
    "https://files.pythonhosted.org/packages/3d/aa/"
    "26d64642d808de4a652579ef950d7cd2d37f080a8babf9c67c6b75fc4c3f/"
    "uv-0.13.9-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
)
UV_SHA256 = "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19"
UV_PROGRAM = "uv-0.13.9.data/scripts/uv"


def main(arguments: list[str]) -> None:
    """Installs the package, then replaces this process by `python -m launch.machine.node`."""
    job_file, work = arguments[0], os.path.abspath(arguments[1])
    os.makedirs(work, exist_ok=True)
    if job_file == "-":
        job_file = os.path.join(work, "job.json")
        with open(job_file, "w", encoding="utf-8") as file:
            file.write(os.environ["MULTIHOT_JOB"])
    job = read_job(job_file)
    wheel, requirements = (fetch(job, job[name], work) for name in ("wheel", "requirements"))
    python = install(wheel, requirements, job["wheel"]["sha256"], work)
    # `-m` looks in the current folder first, which must have no other `launch` or `trainer`.
    os.chdir(work)
    os.execv(python, [python, "-m", "launch.machine.node", job_file, work, *arguments[2:]])


def read_job(path: str) -> dict:
    """What is needed of a job's record, checked by hand: nothing is installed yet."""
    try:
        with open(path, encoding="utf-8") as file:
            job = json.load(file)
        files = [job["wheel"], job["requirements"]]
        texts = [job["name"], job["bucket"], *(item[key] for item in files for key in FIELDS)]
        names = [part for item in files for part in item["name"].split("/")]
        if all(isinstance(text, str) for text in texts) and not {"", ".", ".."} & set(names):
            return job
        error: object = "names of other kinds"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as caught:
        error = repr(caught)
    end(f"{path}: not a job's record ({error}); submit the job again")


def fetch(job: dict, item: dict, work: str) -> str:
    """Downloads a file of the job's package and checks its SHA-256; returns its path."""
    path = os.path.join(work, os.path.basename(item["name"]))
    url = "gs://{}/multihot/{}/package/{}".format(job["bucket"], job["name"], item["name"])
    fetch_file(url, item["sha256"], path)
    return path


def fetch_file(url: str, sha256: str, path: str) -> None:
    """Downloads a URL to `path`, unless it lies there, and checks its SHA-256, if there is one."""
    if sha256 and os.path.exists(path) and digest(path) == sha256:
        return
    download(url, path + ".part")
    found = digest(path + ".part")
    if sha256 not in ("", found):
        end(f"{url}: SHA-256 {found}, expected {sha256}")
    os.replace(path + ".part", path)


def digest(path: str) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def download(url: str, path: str) -> None:
    """Downloads a gs:// or https:// URL to a file; repeats the request while a server is away."""
    remedy = "see that this machine may reach it"
    if url.startswith("gs://"):
        bucket, _, _ = url[len("gs://") :].partition("/")
        remedy = (
            "give the machine's service account access: "
            f"gcloud storage buckets add-iam-policy-binding gs://{bucket} "
            "--member=serviceAccount:ACCOUNT --role=roles/storage.objectAdmin"
        )
    for attempt in range(ATTEMPTS):
        try:
            request = make_request(url)
            with urllib.request.urlopen(request, timeout=60) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file)
                length = answer.headers["Content-Length"]
                if length is not None and file.tell() != int(length):
                    raise ConnectionError(f"{file.tell()} bytes arrived")
            return
        except OSError as error:  # URLError, HTTPError and timeouts are subclasses of it.
            status = getattr(error, "code", None)
            final = status is not None and status < 500 and status not in (408, 429)
            if final or attempt == ATTEMPTS - 1:
                end(f"{url}: {error}; {remedy}")
        pause(attempt)


def make_request(url: str) -> urllib.request.Request:
    """The request for a URL; for gs:// as this machine's account."""
    if not url.startswith("gs://"):
        return urllib.request.Request(url)
    store = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
    bucket, _, name = url[len("gs://") :].partition("/")
    place = "{}/storage/v1/b/{}/o/{}".format(store, bucket, urllib.parse.quote(name, safe=""))
    return urllib.request.Request(
        place + "?alt=media", headers={"Authorization": "Bearer " + token()}
    )


def pause(attempt: int) -> None:
    """Waits after an attempt that has failed, longer after each."""
    time.sleep(FIRST_PAUSE_SECONDS * 2**attempt / SPEED)


def token() -> str:
    """An access token of this machine's account."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/service-accounts/default/token",
        headers={"Metadata-Flavor": "Google"},
    )
    # A proxy that the environment names would not reach the metadata server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return json.load(answer)["access_token"]


def install(wheel: str, requirements: str, fingerprint: str, work: str) -> str:
    """Installs the wheel and its dependencies into an environment in `work`; its Python."""
    environment = os.path.join(work, "environment")
    python = os.path.join(environment, "bin", "python")
    stamp = os.path.join(environment, fingerprint)
    if os.path.exists(stamp):
        return python
    shutil.rmtree(environment, ignore_errors=True)
    started = time.monotonic()
    existing = os.environ.get("MULTIHOT_SITE_PACKAGES")
    installer = make_environment(environment, work, with_pip=not existing)
    if existing:
        (folder,) = find_packages(python)
        with open(os.path.join(folder, "existing.pth"), "w", encoding="utf-8") as file:
            file.write(existing + "\n")
    else:
        run([*installer, "--require-hashes", "-r", requirements], attempts=3)
    offline = ["--no-index", "--ignore-installed"] if existing else []
    run([*installer, "--no-deps", *offline, wheel])
    with open(stamp, "w", encoding="utf-8"):
        pass
    print(f"installed in {time.monotonic() - started:.0f} seconds", flush=True)
    return python


def make_environment(environment: str, work: str, with_pip: bool) -> list[str]:
    """Makes a virtual environment with Python 3.11 to 3.13; the command that installs into it.

    An image may lack such a Python, its venv module or its pip.
    """
    python = os.path.join(environment, "bin", "python")
    options = [] if with_pip else ["--without-pip"]
    bases = find_pythons(work)
    for base in bases:
        if subprocess.call([base, "-m", "venv", *options, environment]) == 0:
            return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        shutil.rmtree(environment, ignore_errors=True)
    uv = fetch_uv(work)
    chosen = ["--python", bases[0]] if bases else ["--python", "3.11", "--managed-python"]
    if not bases:
        print("this image has no Python 3.11 to 3.13: uv brings one from GitHub", flush=True)
    run(
        [uv, "venv", "--quiet", "--clear", *chosen, environment],
        attempts=ATTEMPTS,
        remedy="" if bases else "; give an archive of Python within reach: --python_url=gs://…",
    )
    return [uv, "pip", "install", "--quiet", "--python", python]


def find_pythons(work: str) -> list[str]:
    """Pythons 3.11 to 3.13 of this machine; the one of MULTIHOT_PYTHON_URL alone, if it is set."""
    url, _, fragment = os.environ.get("MULTIHOT_PYTHON_URL", "").partition("#sha256=")
    if not url:
        found = [base for base in map(shutil.which, PYTHONS) if base is not None]
        return [base for base in found if subprocess.call([base, "-c", IS_FIT]) == 0]
    archive, place = os.path.join(work, "python.tar"), os.path.join(work, "python")
    fetch_file(url, fragment, archive)
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    run(["tar", "--extract", "--no-same-owner", "--directory", place, "--file", archive])
    for base in glob.glob(os.path.join(glob.escape(place), "*", "bin", "python3")):
        if subprocess.call([base, "-c", IS_FIT]) == 0:
            return [base]
    end(
        f"{url}: has no FOLDER/bin/python3 of Python 3.11 to 3.13 that runs here; expected an "
        "archive such as python-build-standalone's cpython-3.11.…-install_only.tar.gz"
    )


def fetch_uv(work: str) -> str:
    """The program of uv, which installs packages, and Python too."""
    wheel, program = os.path.join(work, "uv.whl"), os.path.join(work, "uv")
    fetch_file(UV_URL, UV_SHA256, wheel)
    with zipfile.ZipFile(wheel) as archive, open(program, "wb") as file:
        file.write(archive.read(UV_PROGRAM))
    os.chmod(program, 0o755)
    return program


def find_packages(python: str) -> list[str]:
    """The site-packages folder of a Python."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.check_output([python, "-c", script], text=True).splitlines()


def run(command: list[str], attempts: int = 1, remedy: str = "") -> None:
    """Runs a command that has to succeed within `attempts` and INSTALL_SECONDS."""
    deadline = time.monotonic() + INSTALL_SECONDS
    for attempt in range(attempts):
        try:
            code = subprocess.call(command, timeout=deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            end(f"{' '.join(command)} took more than {INSTALL_SECONDS:g} seconds{remedy}")
        if code == 0:
            return
        if attempt < attempts - 1:
            pause(attempt)
    end(f"{' '.join(command)} ended with exit code {code}{remedy}")


def end(message: str) -> NoReturn:
    """Ends the process with a line that says why."""
    print(f"multihot: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
