"""The devices of a run: which there are, the strategy over them, and the precision they suit."""

import contextlib
import glob
import os
import socket
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow.python.client.device_lib import list_local_devices

from trainer.config import ScoreConfig
from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.run_config import OPENVINO, TENSORFLOW, TrainConfig
from trainer.runtime.cluster import (
    Cluster,
    describe_missing,
    naming_lost_workers,
    peer_watch,
    read_cluster,
    rendezvous,
)
from trainer.runtime.interruption import exit_timer
from trainer.runtime.processor import (
    ScoringChoice,
    choose_on_cpu,
    has_openvino,
    read_processor,
)
from trainer.runtime.tpu_environment import has_tpu_support

_LOCAL_TPU = "local"
# Joining takes a second or two, and for ever if one of the workers that just met is lost then.
_JOIN_SECONDS = 45.0
# bfloat16 runs at full speed from this compute capability on.
_BFLOAT16_CAPABILITY = (8, 0)


def local_chips() -> list[str]:
    """The device files of TPU chips on this machine (v2 to v4: accel, newer ones: vfio)."""
    return sorted(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def find_tpu(flag: str | None) -> str | None:
    """The TPU that a run can take: --tpu, else $TPU_NAME, else `local` or None.

    Device files count only with a TensorFlow for TPUs, since vfio serves other devices too.
    """
    local = _LOCAL_TPU if local_chips() and has_tpu_support() else None
    return flag or os.environ.get("TPU_NAME") or local


def _connect_tpu(address: str | None, seconds: float) -> tf.distribute.TPUStrategy:
    """The strategy over all cores of a TPU.

    The address is `local`, a TPU's name (looked up in this VM's project and zone),
    `grpc://HOST:PORT`, or None if there is no TPU.
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
    if address != _LOCAL_TPU:
        hosts = resolver.cluster_spec().as_dict()[resolver.task_type]
        missing = Cluster((socket.gethostname(), *hosts), 0, "--tpu").find_missing()
        if missing:
            raise RunAgain(
                f"--tpu={address}: {describe_missing(missing)}; wait until the TPU is READY, check "
                "its address, then run the same command again"
            )
    # These calls wait without end for a TPU that another process holds or whose runtime is stuck.
    print(
        f"connecting to TPU {address}, for at most --start_timeout={seconds:g} seconds (then exit "
        f"code {RUN_AGAIN}: end other programs that use it, and run the same command again)",
        flush=True,
    )
    with exit_timer(seconds):
        try:
            if address != _LOCAL_TPU:
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
        # Outside Google Cloud no name can be looked up: there is no metadata server.
        reason = "no metadata server" if isinstance(error, OSError) else error
        raise UserError(
            f"--tpu={address}: cannot look up this TPU ({reason}); expected local, "
            "grpc://HOST:PORT, or the name of a TPU in this VM's project and zone"
        ) from error
    return resolver


def _explain(address: str, error: tf.errors.OpError) -> UserError | RunAgain:
    first = str(error.message).partition("\n")[0]
    if isinstance(error, tf.errors.UnavailableError | tf.errors.DeadlineExceededError):
        return RunAgain(f"--tpu={address}: went away ({first}); run the same command again")
    return UserError(
        f"--tpu={address}: TensorFlow finds no usable TPU there ({first}); check that no other "
        "program holds it and that libtpu fits this TensorFlow"
    )


def make_strategy(config: TrainConfig | ScoreConfig) -> tf.distribute.Strategy:
    """The strategy that the flags and the machine ask for; prints what it took and why.

    Training spans all workers of a job; in scoring each worker has a strategy of its own devices.
    Call it before anything else of TensorFlow's. Workers, and CPUs split into several devices, can
    be set up only before TensorFlow looks at its devices. UserError if the flags ask for devices
    that are not there, or contradict each other; RunAgain if workers or a TPU do not appear within
    --start_timeout.
    """
    cluster = read_cluster(os.environ) if isinstance(config, TrainConfig) else None
    name, reason = _choose(config, cluster)
    if name != "tpu":
        reuse_memory()
    if name == "multi_worker":
        assert cluster is not None  # _choose has checked it.
        strategy = _connect_workers(cluster, config.start_timeout)
    elif name == "tpu":
        strategy = _connect_tpu(find_tpu(config.tpu), config.start_timeout)
    elif name == "mirrored":
        strategy = tf.distribute.MirroredStrategy(_mirrored_devices(config.cpu_replicas))
    else:
        device = "/gpu:0" if name == "one_device" else "/cpu:0"
        strategy = tf.distribute.OneDeviceStrategy(device)
    print(f"--strategy={config.strategy}: {name}, {reason}; {_describe(strategy)}", flush=True)
    return strategy


def reuse_memory() -> None:
    """Has TensorFlow keep the CPU's freed tensors for the next ones; what a user set stays.

    Without it the C library gives large tensors back to the system at every step, and the kernel
    clears each page again. With it, on two cores of an AMD EPYC, `score` of MiniLM took 1.2 to 1.35
    times less, and half an epoch of `make train` 1.1 to 1.25 times. TensorFlow reads the variables
    when it sets up its devices, so call this before it executes anything. Hosts of GPUs and TPUs
    have not been measured and stay as they are. The second variable is a limit, 64 GiB by itself.
    """
    if not tf.config.get_visible_devices("GPU"):
        os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
        os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(_machine_memory() >> 20))


def _choose(config: TrainConfig | ScoreConfig, cluster: Cluster | None) -> tuple[str, str]:
    """Name of the strategy, and the reason for it."""
    name, gpus = config.strategy, tf.config.get_visible_devices("GPU")
    if config.tpu and name not in ("auto", "tpu"):
        raise UserError(f"--tpu={config.tpu} with --strategy={name}: expected --strategy=tpu")
    if config.cpu_replicas > 1 and (name != "mirrored" or gpus):
        raise UserError(
            f"--cpu_replicas={config.cpu_replicas}: only for --strategy=mirrored on a machine "
            f"without GPUs; found --strategy={name} and {len(gpus)} GPUs"
        )
    if name in ("auto", "multi_worker") and cluster is not None and cluster.num_workers > 1:
        return "multi_worker", f"{cluster.source} names {cluster.num_workers} workers"
    if name == "multi_worker":
        raise UserError(
            "--strategy=multi_worker: neither TF_CONFIG nor Slurm names more than one worker; set "
            "TF_CONFIG on each host, start the hosts with srun, or take another --strategy"
        )
    if cluster is not None and cluster.num_workers > 1:
        raise UserError(
            f"--strategy={name}: {cluster.source} names {cluster.num_workers} workers, which would "
            f"all train alone into one folder; use --strategy=multi_worker, or unset "
            f"{cluster.source}"
        )
    if name == "one_device" and not gpus:
        raise UserError("--strategy=one_device: TensorFlow sees no GPU; use cpu, or install [gpu]")
    if name != "auto":
        return name, "as asked for"
    tpu = find_tpu(config.tpu)
    if tpu is not None:
        return "tpu", f"found TPU {tpu}"
    if gpus:
        found = "found no TPU and " + ("one GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs")
        return "one_device" if len(gpus) == 1 else "mirrored", found
    return "cpu", "found no TPU and no GPU"


def _mirrored_devices(cpu_replicas: int) -> list[str]:
    """All GPUs, or that many logical CPU devices."""
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        return [f"/gpu:{index}" for index in range(len(gpus))]
    if cpu_replicas == 1:
        raise UserError(
            "--strategy=mirrored: TensorFlow sees no GPU; install [gpu], use --strategy=cpu, or "
            "make replicas of the CPU with --cpu_replicas=N"
        )
    (cpu,) = tf.config.list_physical_devices("CPU")
    devices = [tf.config.LogicalDeviceConfiguration() for _ in range(cpu_replicas)]
    try:
        tf.config.set_logical_device_configuration(cpu, devices)
    except RuntimeError:
        found = len(tf.config.list_logical_devices("CPU"))
        if found < cpu_replicas:
            raise UserError(
                f"--cpu_replicas={cpu_replicas}: this process already runs TensorFlow with {found} "
                "CPU devices; start a process of its own"
            ) from None
    return [f"/cpu:{index}" for index in range(cpu_replicas)]


def _connect_workers(cluster: Cluster, seconds: float) -> tf.distribute.Strategy:
    print(f"waiting for {cluster.num_workers} workers that {cluster.source} names", flush=True)
    rendezvous(cluster, seconds)
    print(
        f"all {cluster.num_workers} workers met; joining them (given up, with exit code "
        f"{RUN_AGAIN}, if one of them leaves meanwhile)",
        flush=True,
    )
    gpus = len(tf.config.get_visible_devices("GPU"))
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kinds.NCCL if gpus else kinds.RING
    )
    # All workers do the same, so the chief is one of the workers here.
    spec, index = tf.train.ClusterSpec({"worker": list(cluster.addresses)}), cluster.index
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec, task_type="worker", task_id=index, num_accelerators={"GPU": gpus}, rpc_layer="grpc"
    )
    try:
        with exit_timer(_JOIN_SECONDS), naming_lost_workers(cluster):
            return tf.distribute.MultiWorkerMirroredStrategy(
                cluster_resolver=resolver, communication_options=options
            )
    except RuntimeError as error:
        raise UserError(
            f"--strategy=multi_worker: {error}; start a process of its own for each worker"
        ) from error


def cluster_of(strategy: tf.distribute.Strategy) -> Cluster | None:
    """The workers that a strategy spans; None if it is not over several."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    resolver = strategy.cluster_resolver
    addresses = resolver.cluster_spec().job_tasks("worker")
    return Cluster(tuple(addresses), resolver.task_id, "the strategy")


def num_workers(strategy: tf.distribute.Strategy) -> int:
    """How many processes run the same program; a TPU slice has one."""
    cluster = cluster_of(strategy)
    return 1 if cluster is None else cluster.num_workers


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes in the model folder."""
    cluster = cluster_of(strategy)
    return cluster is None or cluster.index == 0


@contextlib.contextmanager
def watching_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Ends a block of collective work when another worker is lost: `RunAgain` names it.

    A block that ends well, or by a stop that all workers agreed on, waits for the other workers:
    otherwise the first that ends would look lost to those that still wait for the chief's last
    checkpoint. With a strategy of a single process this does nothing.
    """
    cluster = cluster_of(strategy)
    if cluster is None:
        yield
        return
    with peer_watch(cluster), naming_lost_workers(cluster):
        try:
            yield
        except RunAgain:
            is_same_everywhere(strategy, 0)
            raise
        is_same_everywhere(strategy, 0)


def is_same_everywhere(strategy: tf.distribute.Strategy, value: int) -> bool:
    """Whether all workers pass the same value, below 2^24; waits until all have called it."""

    @tf.function
    def sum_over_replicas() -> tf.Tensor:
        return strategy.run(
            lambda: tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM,
                tf.stack([tf.constant(value, tf.float64), tf.constant(value**2, tf.float64)]),
            )
        )

    sums = strategy.experimental_local_results(sum_over_replicas())[0].numpy()
    # Only equal values have both the sum and the sum of squares of that many copies of `value`.
    count = strategy.num_replicas_in_sync
    return bool(sums[0] == count * value and sums[1] == count * value**2)


def from_chief(strategy: tf.distribute.Strategy, value: np.ndarray) -> np.ndarray:
    """The chief's array, on all workers; waits until all have called it with the same shape."""
    if num_workers(strategy) == 1:
        return value
    mine = value if is_chief(strategy) else np.zeros_like(value)
    replicas = strategy.num_replicas_in_sync // num_workers(strategy)

    @tf.function
    def sum_over_replicas() -> tf.Tensor:
        def of_replica() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            # One replica of each worker counts; the sum adds zeros to the chief's.
            is_first = context.replica_id_in_sync_group % replicas == 0
            part = tf.where(is_first, tf.constant(mine), tf.zeros(mine.shape, mine.dtype))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, part)

        return strategy.run(of_replica)

    return strategy.experimental_local_results(sum_over_replicas())[0].numpy()


def wait_for_chief(strategy: tf.distribute.Strategy) -> None:
    """Returns on all workers once the chief has called it too."""
    from_chief(strategy, np.zeros(1, np.float32))


def is_on_cpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the strategy's replicas are CPUs."""
    return "CPU" in strategy.extended.worker_devices[0].upper()


def is_tpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the strategy's replicas are TPU cores."""
    return "TPU" in strategy.extended.worker_devices[0].upper()


def should_jit(flag: str, strategy: tf.distribute.Strategy) -> bool:
    """Whether XLA compiles the step, by --jit_compile; UserError for `true` on a TPU."""
    if is_tpu(strategy):
        if flag == "true":
            raise UserError(
                "--jit_compile=true: a TPU's strategy compiles the step itself, and compiling it "
                "on the host as well fails; leave the flag out"
            )
        return False
    return flag != "false"


def should_jit_inference(flag: str, strategy: tf.distribute.Strategy | None) -> bool:
    """The same of a forward pass alone, where `auto` leaves CPUs out; None: without a strategy.

    There TensorFlow's own products, with bias, GELU and residual fused in, are faster: 65 documents
    a second of MiniLM against 40 with XLA.
    """
    if flag == "auto":
        has_gpu = bool(tf.config.get_visible_devices("GPU"))
        return has_gpu if strategy is None else not (is_on_cpu(strategy) or is_tpu(strategy))
    return flag == "true" if strategy is None else should_jit(flag, strategy)


def choose_precision(name: str, strategy: tf.distribute.Strategy) -> str:
    """The Keras policy for --precision; `auto` becomes the one that suits the devices.

    That is bfloat16 on TPUs and if every GPU of this process has compute capability 8.0 or higher,
    float16 on older GPUs, float32 on CPUs. Workers are expected to have equal devices.
    """
    if name != "auto":
        return name
    if is_on_cpu(strategy):
        return "float32"
    if is_tpu(strategy):
        return "mixed_bfloat16"
    capabilities = [details.get("compute_capability", (0, 0)) for details in _gpu_details()]
    return "mixed_bfloat16" if min(capabilities) >= _BFLOAT16_CAPABILITY else "mixed_float16"


def choose_scoring(
    engine: str, precision: str, strategy: tf.distribute.Strategy, force: bool = False
) -> ScoringChoice:
    """The engine and precision for the flags of `score`; UserError for what devices do not have.

    float16 is never chosen: ordinary weights can exceed its range.
    """
    if is_on_cpu(strategy):
        return choose_on_cpu(engine, precision, read_processor(), has_openvino(), force)
    if engine == OPENVINO or precision == "int8":
        flag = "engine=openvino" if engine == OPENVINO else f"precision={precision}"
        raise UserError(f"--{flag}: runs on CPUs alone; leave it out, or give --strategy=cpu")
    if precision == "auto":
        is_narrow = choose_precision("auto", strategy) == "mixed_bfloat16"
        precision = "bfloat16" if is_narrow else "float32"
    return ScoringChoice(TENSORFLOW, precision)


def _gpu_details() -> list[dict]:
    gpus = tf.config.get_visible_devices("GPU")
    return [tf.config.experimental.get_device_details(gpu) for gpu in gpus]


def _describe(strategy: tf.distribute.Strategy) -> str:
    """Replicas, devices and their memory, for the log."""
    replicas, cluster = strategy.num_replicas_in_sync, cluster_of(strategy)
    text = f"{replicas} replica{'s' if replicas > 1 else ''}, "
    if cluster is not None:
        text += f"this is worker {cluster.index} of {cluster.num_workers}, "
    return text + f"{len(strategy.extended.worker_devices)} x {_device_name(strategy)}"


def _device_name(strategy: tf.distribute.Strategy) -> str:
    if is_tpu(strategy):
        return "TPU core"
    if is_on_cpu(strategy):
        return f"CPU ({_gibibytes(_machine_memory())} in this machine)"
    name = _gpu_details()[0].get("device_name", "GPU")
    # TensorFlow's limit, which is less than the GPU's memory.
    limits = [item.memory_limit for item in list_local_devices() if item.device_type == "GPU"]
    return f"{name} ({_gibibytes(min(limits))} for TensorFlow)" if limits else name


def _machine_memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
