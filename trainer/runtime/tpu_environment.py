"""What TensorFlow for TPUs reads from the environment when it is imported, by the TPU at hand.

It drives v2, v3 and v4 through StreamExecutor, and v5e, v5p and v6e through PJRT, which two
variables select (Google's page on training on v5e, and its tests of TensorFlow in
GoogleCloudPlatform/ml-auto-solutions). With them a v4 is said to fail, so they are set by the kind
of chip. This module imports nothing heavy: it has to run before TensorFlow.
"""

import glob
import importlib.util
import os
from collections.abc import MutableMapping
from importlib import metadata

_GOOGLE = "0x1ae0"
# Of PCI devices, as JAX tells kinds apart (jax/_src/hardware_utils.py).
_KINDS = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "v7x",
}
_WITHOUT_PJRT = ("v2 or v3", "v4")
# Google and Keras set these together with PJRT (keras.io, distributed embedding on TPUs).
_XLA_FLAGS = (
    "--tf_mlir_enable_mlir_bridge=true "
    "--tf_mlir_enable_convert_control_to_data_outputs_pass=true "
    "--tf_mlir_enable_merge_control_flow_pass=true"
)


def has_tpu_support() -> bool:
    """Whether the installed TensorFlow is the distribution for TPUs."""
    try:
        metadata.version("tensorflow-tpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def prepare(variables: MutableMapping[str, str] = os.environ, root: str = "/") -> None:
    """Sets the variables that TensorFlow for TPUs needs on this machine; given ones stay.

    `root` is the folder of the machine's /sys. A process that leaves the chips to another one
    (`TPU_LOAD_LIBRARY=0`) gets none.
    """
    if not has_tpu_support():
        return
    kind, library = find_kind(root), _find_library()
    if kind is None and not _is_at_google(root):
        # Without it libtpu asks for minutes for a metadata server that is not there.
        variables.setdefault("TPU_SKIP_MDS_QUERY", "1")
    leaves_chips = variables.get("TPU_LOAD_LIBRARY") == "0"
    if kind is None or kind in _WITHOUT_PJRT or library is None or leaves_chips:
        return
    variables.setdefault("NEXT_PLUGGABLE_DEVICE_USE_C_API", "true")
    variables.setdefault("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", library)
    variables.setdefault("TF_XLA_FLAGS", _XLA_FLAGS)


def find_kind(root: str = "/") -> str | None:
    """The kind of this machine's TPU chips, such as `v5e`; None without chips."""
    for folder in sorted(glob.glob(os.path.join(root, "sys/bus/pci/devices/*"))):
        if _read(os.path.join(folder, "vendor")) == _GOOGLE:
            kind = _KINDS.get(_read(os.path.join(folder, "device")))
            if kind is not None:
                return kind
    return None


def _is_at_google(root: str) -> bool:
    """Whether this is a machine of Google's cloud, by its firmware, as google-auth tells it."""
    return _read(os.path.join(root, "sys/class/dmi/id/product_name")).startswith("Google")


def _find_library() -> str | None:
    """The installed libtpu.so, found without loading it."""
    found = importlib.util.find_spec("libtpu")
    folders = found.submodule_search_locations if found is not None else None
    paths = [os.path.join(folder, "libtpu.so") for folder in folders or ()]
    return next((path for path in paths if os.path.exists(path)), None)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
