"""Finding a TPU and connecting to it, with one clear line when there is none."""

import glob
import os
import socket
from importlib import metadata

import tensorflow as tf

from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.runtime.cluster import Cluster
from trainer.runtime.exit_timer import ExitTimer
from trainer.runtime.peers import describe_missing

LOCAL = "local"


def has_tpu_support() -> bool:
    """Whether this TensorFlow is the distribution that is built for TPUs."""
    try:
        metadata.version("tensorflow-tpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def local_chips() -> list[str]:
    """The device files of TPU chips on this machine (v2 to v4: accel, newer ones: vfio)."""
    return sorted(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def find_tpu(flag: str | None) -> str | None:
    """The TPU that a run can take: what --tpu says, else $TPU_NAME, else a local one, else None.

    Chips count only with a TensorFlow that can use them: vfio serves other devices too.
    """
    address = flag or os.environ.get("TPU_NAME")
    if address:
        return address
    return LOCAL if local_chips() and has_tpu_support() else None


def connect_tpu(address: str | None, seconds: float) -> tf.distribute.TPUStrategy:
    """The strategy over all cores of a TPU.

    Args:
      address: `local`, a TPU's name (asked for in this VM's project and zone), or
        `grpc://HOST:PORT`; None if there is none.
      seconds: to wait for it.

    Raises:
      UserError: if there is no such TPU, or this TensorFlow cannot use one.
      RunAgain: if it does not answer.
    """
    if address is None:
        raise UserError(
            "--strategy=tpu: this machine has no TPU (/dev/accel*, /dev/vfio/*, $TPU_NAME);"
            " give --tpu=NAME or --tpu=grpc://HOST:PORT, or choose another --strategy"
        )
    if not has_tpu_support():
        raise UserError(
            f"--tpu={address}: this TensorFlow {tf.__version__} is not built for TPUs; install "
            "multihot[tpu] in an environment of its own"
        )
    resolver = _resolve(address)
    if address != LOCAL:
        missing = _workers(resolver).find_missing()
        if missing:
            raise RunAgain(
                f"--tpu={address}: {describe_missing(missing)}; wait until the TPU is READY, check "
                "its address, then run the same command again"
            )
    # A TPU that another process holds, or whose runtime is stuck, can keep these calls waiting.
    print(
        f"connecting to TPU {address}, for at most --start_timeout={seconds:g} seconds (then exit "
        f"code {RUN_AGAIN}: end other programs that use it, and run the same command again)",
        flush=True,
    )
    with ExitTimer(seconds):
        try:
            if address != LOCAL:
                tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
            return tf.distribute.TPUStrategy(resolver)
        except tf.errors.OpError as error:
            raise _explain(address, error) from error
        except RuntimeError as error:
            raise UserError(f"--tpu={address}: {error}") from error


def _resolve(address: str) -> tf.distribute.cluster_resolver.TPUClusterResolver:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
        resolver.cluster_spec()
    except (ValueError, RuntimeError, OSError) as error:
        # Outside of Google Cloud a name cannot be looked up: no metadata server, no API client.
        reason = "no metadata server" if isinstance(error, OSError) else error
        raise UserError(
            f"--tpu={address}: cannot look up this TPU ({reason}); expected local, "
            "grpc://HOST:PORT, or the name of a TPU in this VM's project and zone"
        ) from error
    return resolver


def _workers(resolver: tf.distribute.cluster_resolver.TPUClusterResolver) -> Cluster:
    """The TPU's hosts, as the other workers of this process."""
    hosts = resolver.cluster_spec().as_dict()[resolver.task_type]
    return Cluster((socket.gethostname(), *hosts), 0, "--tpu")


def _explain(address: str, error: tf.errors.OpError) -> UserError | RunAgain:
    """What a failed connection means to the user."""
    first = str(error.message).partition("\n")[0]
    if isinstance(error, tf.errors.UnavailableError | tf.errors.DeadlineExceededError):
        return RunAgain(f"--tpu={address}: went away ({first}); run the same command again")
    return UserError(
        f"--tpu={address}: TensorFlow finds no usable TPU there ({first}); check that no other "
        "program holds it and that libtpu fits this TensorFlow"
    )
