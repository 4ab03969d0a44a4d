"""Installs a job's package on the machine that is to run the job, and starts the job.

    python3 bootstrap.py JOB_FILE WORK_DIR [FLAGS OF launch.machine.node ...]

JOB_FILE is a job's record (launch/job.py); `-` stands for the text in $MULTIHOT_JOB. This file uses
only the standard library of Python 3.8 or newer, because Multihot is not installed yet. A second
run in the same WORK_DIR uses what the first one installed. GCE_METADATA_HOST and
STORAGE_EMULATOR_HOST name other servers, and MULTIHOT_SITE_PACKAGES a folder of installed
dependencies to use.
"""

from __future__ import annotations

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
from typing import NoReturn

PYTHONS = ("python3.11", "python3.12", "python3.13", "python3")
FIELDS = ("name", "sha256")
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0
# Installs Python where an image has none that is new enough; the hash is that of Linux's wheel.
UV = "uv==0.13.9 --hash=sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19\n"


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
    if not (os.path.exists(path) and digest(path) == item["sha256"]):
        name = "multihot/{}/package/{}".format(job["name"], item["name"])
        download(job["bucket"], name, path + ".part")
        found = digest(path + ".part")
        if found != item["sha256"]:
            end(f"gs://{job['bucket']}/{name}: SHA-256 {found}, expected {item['sha256']}")
        os.replace(path + ".part", path)
    return path


def digest(path: str) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def download(bucket: str, name: str, path: str) -> None:
    """Downloads an object to a file; repeats the request while the store is away."""
    store = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
    url = "{}/storage/v1/b/{}/o/{}?alt=media".format(
        store, bucket, urllib.parse.quote(name, safe="")
    )
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(url, headers={"Authorization": "Bearer " + token()})
            with urllib.request.urlopen(request, timeout=60) as answer, open(path, "wb") as file:
                shutil.copyfileobj(answer, file)
                if file.tell() != int(answer.headers["Content-Length"]):
                    raise ConnectionError(f"{file.tell()} bytes arrived")
            return
        except OSError as error:  # URLError, HTTPError and timeouts are subclasses of it.
            status = getattr(error, "code", None)
            final = status is not None and status < 500 and status not in (408, 429)
            if final or attempt == ATTEMPTS - 1:
                end(
                    f"gs://{bucket}/{name}: {error}; give the machine's service account access: "
                    f"gcloud storage buckets add-iam-policy-binding gs://{bucket} "
                    "--member=serviceAccount:ACCOUNT --role=roles/storage.objectAdmin"
                )
        time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)


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
        run([*installer, "--require-hashes", "-r", requirements])
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
    check = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    options = [] if with_pip else ["--without-pip"]
    for name in PYTHONS:
        base = shutil.which(name)
        if base is None or subprocess.call([base, "-c", check]) != 0:
            continue
        if subprocess.call([base, "-m", "venv", *options, environment]) == 0:
            return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        shutil.rmtree(environment, ignore_errors=True)
    print("this image has no Python 3.11 to 3.13 with venv: uv brings one", flush=True)
    pinned = os.path.join(work, "uv.txt")
    with open(pinned, "w", encoding="utf-8") as file:
        file.write(UV)
    place = os.path.join(work, "uv")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", place, "--upgrade"]
        + ["--require-hashes", "-r", pinned]
    )
    uv = os.path.join(place, "bin", "uv")
    run([uv, "venv", "--quiet", "--python", "3.11", "--managed-python", environment])
    return [uv, "pip", "install", "--quiet", "--python", python]


def find_packages(python: str) -> list[str]:
    """The site-packages folder of a Python."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.check_output([python, "-c", script], text=True).splitlines()


def run(command: list[str]) -> None:
    """Runs a command that has to succeed."""
    code = subprocess.call(command)
    if code != 0:
        end(f"{' '.join(command)} ended with exit code {code}")


def end(message: str) -> NoReturn:
    """Ends the process with a line that says why."""
    print(f"multihot: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
