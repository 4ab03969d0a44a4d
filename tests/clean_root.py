"""A root folder like that of a slice's image, in which a host boots by `chroot`.

It is Debian 12, whose C library is close to that of Ubuntu 22.04, with Python 3.9 as python3, no
venv, no pip, and a lock of apt that is always taken. Processes have a PID namespace and mounts of
their own; the network is that of the machine. `shutdown` ends all of them.
"""

import fcntl
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import certifi
import fake_gcs
from booting import BUCKET, Host
from fake_gcs import FakeStorage
from fake_machine import FakeMachine, serve

from launch.cloud.tpu_slices import make_metadata
from launch.job import Job

_MIRROR = "http://deb.debian.org/debian"
# Beside curl, what Python 3.11 is linked to, and most images have.
_PACKAGES = "curl,ca-certificates,libsqlite3-0,libreadline8,libncursesw6,libuuid1,libexpat1"
_OLD_PYTHON = f"""
set -e
echo 'deb {_MIRROR} bullseye main' >/etc/apt/sources.list.d/bullseye.list
apt-get -qq update
apt-get -qq install -y --no-install-recommends python3.9
ln -s python3.9 /usr/bin/python3
mkdir /debs && cd /debs
apt-get -qq download python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
for deb in *.deb; do dpkg -x "$deb" /debs/tree; done
"""
_SHUTDOWN = '#!/bin/sh\necho shutdown "$@" >>/shut-down\n'
# The machine outlives the startup script.
_INIT = "bash /startup-script & until [ -e /shut-down ]; do sleep 0.1; done"
_AUTHORITIES = "/authorities.pem"


def why_not() -> str:
    """What is missing for a clean root; "" for nothing."""
    if os.geteuid() != 0:
        return "only root can make a clean root"
    for program in ("debootstrap", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed; apt-get install debootstrap util-linux"
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "this container may not make namespaces" if probe.returncode else ""


def make_root(folder: Path) -> Path:
    """A new root in a folder; OSError if Debian's packages are out of reach."""
    root = folder / "root"
    _run("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", root, _MIRROR)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    _run("chroot", root, "sh", "-c", _OLD_PYTHON)
    with tarfile.open(folder / "python.tar.gz", "w:gz", compresslevel=1) as archive:
        tree = root / "debs/tree/usr"
        archive.add(tree / "bin/python3.11", "python/bin/python3")
        archive.add(tree / "lib/python3.11", "python/lib/python3.11")
    shutil.rmtree(root / "debs")
    (root / "sbin/shutdown").write_text(_SHUTDOWN)
    (root / "sbin/shutdown").chmod(0o755)
    # A device of the machine that the tests run on.
    (root / "dev/console").unlink(missing_ok=True)
    return root


def _run(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")


def ask(root: Path, command: str) -> subprocess.CompletedProcess:
    """Runs a shell's command in the root."""
    words = ["chroot", str(root), "sh", "-c", command]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@contextmanager
def apt_locked(root: Path) -> Iterator[None]:
    """Holds apt's lock, as an image's unattended upgrades do for minutes after each start."""
    with (root / "var/lib/dpkg/lock-frontend").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


class RootHost(Host):
    """A host that boots in a clean root."""

    @property
    def work(self) -> Path:
        """What the script keeps on its disk."""
        return self.folder / "var/lib/multihot"

    def start(self) -> None:
        """Boots."""
        (self.folder / "startup-script").write_text(self.machine.attributes["startup-script"])
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, f"--root={self.folder}", "sh", "-c", _INIT],
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """Takes the machine away."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait_for_end(self, seconds: float) -> float:
        """Seconds until the machine was deleted or had shut itself down."""
        assert self.process is not None
        started = time.monotonic()
        while not self.machine.deletes and self.process.poll() is None:
            assert time.monotonic() < started + seconds, self.read_log()
            time.sleep(0.05)
        return time.monotonic() - started

    def read_log(self) -> str:
        """What the startup script and its watchdog have printed."""
        return "".join((self.work / name).read_text() for name in ("startup.log", "watchdog.log"))

    @property
    def console(self) -> str:
        """What is said on the serial console."""
        path = self.folder / "dev/console"
        return path.read_text() if path.exists() else ""


@contextmanager
def boot_in(root: Path, folder: Path, job: Job, speed: int) -> Iterator[RootHost]:
    """A host of a job that has not started yet, in a root that is cleaned afterwards.

    Args:
      root: of `make_root`.
      folder: for certificates.
      job: what the host's metadata tell it to do.
      speed: how often faster than others its clock runs.
    """
    machine = FakeMachine(make_metadata(job, attempt=0))
    storage = FakeStorage({BUCKET: {}, "data": {}})
    with serve(machine) as address, fake_gcs.serve(storage, str(folder)) as environment:
        authority = Path(environment["CURL_CA_BUNDLE"]).read_text()
        known = os.environ.get("PIP_CERT") or certifi.where()
        (root / _AUTHORITIES[1:]).write_text(Path(known).read_text() + authority)
        environment |= {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "CURL_CA_BUNDLE": _AUTHORITIES,
            "SSL_CERT_FILE": _AUTHORITIES,
            # Packages come from the index itself, and not from the proxy of the fake store.
            "NO_PROXY": "pypi.org,pythonhosted.org",
            "GCE_METADATA_HOST": address,
            "MULTIHOT_TPU_URL": f"http://{address}",
            "MULTIHOT_SPEED": str(speed),
        }
        host = RootHost(machine, storage, root, environment)
        try:
            yield host
        finally:
            host.kill()
            shutil.rmtree(host.work, ignore_errors=True)
            for name in ("shut-down", "dev/console"):
                (root / name).unlink(missing_ok=True)
