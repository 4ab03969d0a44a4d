"""What TensorFlow for TPUs is told before it is imported, and that it does it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime import tpu_environment
from trainer.runtime.tpu_environment import find_kind, prepare

PJRT = {"NEXT_PLUGGABLE_DEVICE_USE_C_API", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "TF_XLA_FLAGS"}
CHIPS = {"v2 or v3": "0x0027", "v4": "0x005e", "v5p": "0x0062", "v5e": "0x0063", "v6e": "0x006f"}
PROJECT = Path(tpu_environment.__file__).parents[2]


def make_machine(root, kind=None, firmware="Google Compute Engine"):
    """A folder with the files of /sys that tell chips and machines apart."""
    folder = root / "sys" / "class" / "dmi" / "id"
    folder.mkdir(parents=True)
    (folder / "product_name").write_text(f"{firmware}\n")
    devices = [("0x1af4", "0x1004"), ("0x1ae0", "0x0042")]  # A disk, Google's network card.
    devices += [("0x1ae0", CHIPS[kind])] * 4 if kind else []
    for index, (vendor, device) in enumerate(devices):
        folder = root / "sys" / "bus" / "pci" / "devices" / f"0000:00:{index:02}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    return str(root)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A libtpu that is installed beside TensorFlow for TPUs."""
    monkeypatch.setattr(tpu_environment, "has_tpu_support", lambda: True)
    folder = tmp_path / "packages" / "libtpu"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "libtpu.so"):
        (folder / name).touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    return str(folder / "libtpu.so")


@pytest.mark.parametrize("kind", CHIPS)
def test_pjrt_is_for_v5e_and_newer(kind, library, tmp_path):
    root = make_machine(tmp_path, kind)
    assert find_kind(root) == kind
    variables: dict[str, str] = {}
    prepare(variables, root)
    assert set(variables) == (PJRT if kind in ("v5e", "v5p", "v6e") else set())
    if variables:
        assert variables["NEXT_PLUGGABLE_DEVICE_USE_C_API"] == "true"
        assert variables["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] == library


def test_what_the_user_sets_stays(library, tmp_path):
    given = {"NEXT_PLUGGABLE_DEVICE_USE_C_API": "false", "TF_XLA_FLAGS": "--mine"}
    variables = dict(given)
    prepare(variables, make_machine(tmp_path, "v5e"))
    assert variables == given | {"TF_PLUGGABLE_DEVICE_LIBRARY_PATH": library}


def test_a_process_that_leaves_the_chips_to_another_gets_none(library, tmp_path):
    variables = {"TPU_LOAD_LIBRARY": "0"}
    prepare(variables, make_machine(tmp_path, "v5e"))
    assert variables == {"TPU_LOAD_LIBRARY": "0"}


def test_off_googles_machines_nobody_asks_for_their_metadata(library, tmp_path):
    variables: dict[str, str] = {}
    prepare(variables, make_machine(tmp_path / "other", firmware="KVM"))
    assert variables == {"TPU_SKIP_MDS_QUERY": "1"}
    variables.clear()
    prepare(variables, make_machine(tmp_path / "google"))
    assert variables == {}


def test_another_tensorflow_and_a_missing_libtpu_are_left_alone(tmp_path, monkeypatch):
    root, variables = make_machine(tmp_path, "v5e"), {}
    prepare(variables, root)  # The tests' TensorFlow is for CPUs.
    monkeypatch.setattr(tpu_environment, "has_tpu_support", lambda: True)
    monkeypatch.setattr(tpu_environment, "_find_library", lambda: None)
    prepare(variables, root)
    assert variables == {}


@pytest.mark.long
def test_tensorflow_for_tpus_takes_the_path_that_it_is_told(tmp_path):
    """The locked TensorFlow and libtpu in an environment of their own, without a TPU: PJRT for a
    v5e, StreamExecutor for a v4."""
    python = str(tmp_path / "venv" / "bin" / "python")
    uv = str(Path(sys.executable).with_name("uv"))
    lock = str(PROJECT / "requirements" / "tpu.txt")
    subprocess.run([uv, "venv", "--quiet", str(tmp_path / "venv")], check=True)
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, "--require-hashes", "-r", lock],
        check=True,
    )
    script = (
        "import sys; from trainer.runtime.tpu_environment import prepare; prepare(root=sys.argv[1])"
        "; import tensorflow as tf; print(sorted({d.device_type for d in "
        "tf.config.list_physical_devices()}))"
    )
    logs = {}
    for kind in ("v5e", "v4"):
        root = make_machine(tmp_path / kind, kind)
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(
            # The machine is not Google's, whatever the fake one says.
            [python, "-c", script, root], env=variables | {"TPU_SKIP_MDS_QUERY": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "['CPU', 'TPU_SYSTEM']"
        logs[kind] = done.stderr
    is_set, waits = "PJRT_Api is set for device type tpu", "No TPU platform registered"
    assert is_set in logs["v5e"] and waits not in logs["v5e"]
    assert is_set not in logs["v4"] and waits in logs["v4"]
    versions = re.search(
        r"plugin has PJRT API version 0\.(\d+)\. The framework PJRT API version is 0\.(\d+)\.",
        logs["v5e"],
    )
    assert versions and 0 <= int(versions[1]) - int(versions[2]) <= 1
