"""Which devices a run takes, and in which precision."""

import logging

import tensorflow as tf

from trainer.errors import UserError

_logger = logging.getLogger(__name__)


def make_strategy(name: str) -> tf.distribute.Strategy:
    """The strategy of that name over what this machine has.

    Args:
      name: `auto` (the first GPU, else the CPU), `one_device` (the first GPU) or `cpu`.

    Raises:
      UserError: if `one_device` finds no GPU.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if name == "one_device" and not gpus:
        raise UserError("--strategy=one_device: TensorFlow sees no GPU; use cpu, or install [gpu]")
    device = "/gpu:0" if gpus and name != "cpu" else "/cpu:0"
    _logger.info("--strategy=%s: running on %s", name, device)
    return tf.distribute.OneDeviceStrategy(device)


def is_on_cpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the strategy's replicas are CPUs."""
    return "CPU" in strategy.extended.worker_devices[0].upper()


def choose_precision(name: str, strategy: tf.distribute.Strategy) -> str:
    """`float32` or `mixed_bfloat16`; `auto` takes bfloat16 on GPUs of compute capability 8 and up.

    Args:
      name: the flag's value.
      strategy: what the run takes.
    """
    if name != "auto":
        return name
    if is_on_cpu(strategy):
        return "float32"
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return "mixed_bfloat16" if details.get("compute_capability", (0, 0)) >= (8, 0) else "float32"
