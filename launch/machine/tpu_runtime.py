"""Serves the TPU chips of one host of a slice to the TensorFlow of another (run with `python -m`).

The server is TensorFlow's own grpc_tpu_worker. Its entry point has a table of the kinds of chips
and fails for newer ones. Newer libtpu finds the shape of the slice by itself, so that this module
sets the remaining variables only.
"""

import os
import urllib.request

from trainer.runtime import tpu_environment

METADATA = "computeMetadata/v1/instance"
MESH_PORT = 8476


def read_metadata(path: str) -> str:
    """The value of this machine's metadata under a path."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/{METADATA}/{path}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return answer.read().decode()


def slice_variables() -> dict[str, str]:
    """The environment variables from which libtpu learns this host's place in its slice."""
    endpoints = read_metadata("attributes/worker-network-endpoints").split(",")
    first = endpoints[0].rpartition(":")[2].strip()
    return {
        "CLOUD_TPU_TASK_ID": read_metadata("attributes/agent-worker-number"),
        "TPU_HOSTNAME_OVERRIDE": read_metadata("network-interfaces/0/ip"),
        "TPU_LOCK_DEVICE": "true",
        "TPU_MESH_CONTROLLER_ADDRESS": f"{first}:{MESH_PORT}",
        "TPU_MESH_CONTROLLER_PORT": str(MESH_PORT),
        "TPU_STDERR_LOG_LEVEL": "0",
    }


def main() -> None:
    """Serves until the process is killed."""
    # The commands on this host leave the chips to this process.
    os.environ.update(slice_variables(), TPU_LOAD_LIBRARY="1")
    tpu_environment.prepare()
    # Part of TensorFlow for TPUs only; reads the variables when it is imported.
    from tensorflow.python.tools import grpc_tpu_worker

    grpc_tpu_worker.main(None)


if __name__ == "__main__":
    main()
