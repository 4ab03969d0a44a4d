"""`multihot train`: shards to checkpoints, the run as one story from top to bottom."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import tensorflow as tf

from trainer.config import absolute
from trainer.data import input_pipeline
from trainer.data.input_pipeline import Stream, open_stream, read_micro_batches
from trainer.data.metadata import Metadata, load_metadata, naming_damaged_shards
from trainer.errors import RUN_AGAIN, RunAgain, UserError
from trainer.model.predictor import StoppedError
from trainer.run_config import TrainConfig
from trainer.runtime import devices
from trainer.runtime.cluster import read_cluster
from trainer.runtime.devices import is_chief
from trainer.runtime.interruption import Interruption
from trainer.runtime.owner import OWNER_FILE, owned
from trainer.storage.filesystem import exists, refuse_link, write_atomically
from trainer.streams import end_process
from trainer.training import setup
from trainer.training.checkpoint import Checkpoints
from trainer.training.checkpoint_folder import BEST_FOLDER, CHECKPOINT_FOLDER
from trainer.training.head_start import find_head_start, settle_head
from trainer.training.metrics_log import TENSORBOARD_FOLDER, MetricsLog
from trainer.training.run_record import CONFIG_FILE, RunRecord, start_record
from trainer.training.selection import BestCheckpoint, Evaluation, next_checkpoint, next_evaluation
from trainer.training.soft_targets import find_soft_targets
from trainer.training.step import TrainStep, read_position
from trainer.training.teacher import find_teacher

BAD_STEPS_FILE = "bad_steps.json"
# Between two looks of the host at a GPU or TPU.
_STEPS_PER_LOOP = 20
# An evaluation that is asked to stop gets so long to end by itself.
_SECONDS_TO_STOP = 3.0


@dataclass
class Run:
    """All that a run consists of, once it is built; `resumed` once a checkpoint is restored."""

    config: TrainConfig
    record: RunRecord
    stream: Stream
    strategy: tf.distribute.Strategy
    step: TrainStep
    selection: BestCheckpoint
    checkpoints: Checkpoints
    resumed: bool = False

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self.step.progress.steps)

    @property
    def documents(self) -> int:
        """Documents consumed."""
        return int(self.step.progress.documents)

    @property
    def is_finished(self) -> bool:
        """Whether all documents are consumed, or patience has run out."""
        return self.selection.is_finished(self.config, self.documents, self.record.total_documents)


def run(config: TrainConfig, interruption: Interruption | None = None) -> None:
    """Trains, or resumes, or says that there is nothing left to do.

    Raises:
      UserError: for anything about the data, the checkpoint or the flags that the user can mend,
        and if another run is writing to the model folder.
      RunAgain: if the run was stopped, or lost a worker; it goes on when it is run again.
    """
    metadata = load_metadata(config.data_dir)
    with _owning(config):
        for name in (BEST_FOLDER, CHECKPOINT_FOLDER, TENSORBOARD_FOLDER):
            refuse_link(os.path.join(config.model_dir, name))
        _run(config, metadata, interruption)


def _owning(config: TrainConfig) -> AbstractContextManager[None]:
    """Keeps other runs out of the model folder; of several workers the chief owns it for all."""
    cluster = read_cluster(os.environ)
    if cluster is not None and cluster.index:
        return contextlib.nullcontext()
    # A store that refuses says so of the run's own file, after the repeats that a user can set.
    exists(os.path.join(config.model_dir, CONFIG_FILE))
    path = os.path.join(config.model_dir, OWNER_FILE)
    return owned(path, f"--model_dir={config.model_dir}", "train")


def _run(config: TrainConfig, metadata: Metadata, interruption: Interruption | None) -> None:
    setup.check_tokenizer(config.data_dir, metadata)
    teacher = find_teacher(config, metadata)
    packing = setup.choose_run_packing(config, metadata)
    stream = open_stream(config.data_dir, metadata, "train", packing)
    # Opened only to find a damaged split now and not after an epoch.
    open_stream(config.data_dir, metadata, config.eval_split, packing)
    # Before anything else that TensorFlow executes: several workers have to find each other first.
    strategy = devices.make_strategy(config)
    read = [(config.data_dir, metadata, "train"), (config.data_dir, metadata, config.eval_split)]
    with devices.watching_workers(strategy), contextlib.ExitStack() as stack:
        if teacher is not None:
            targets = find_soft_targets(config, metadata, teacher, strategy)
            stream, packing = targets.open(), targets.packing
            read[0] = targets.data_dir, targets.metadata, "train"
        head = settle_head(config, metadata, packing, strategy)
        sizes, values = setup.choose_model(dataclasses.replace(config, head=head), metadata)
        record = setup.make_record(config, metadata, sizes, packing, strategy, stream.num_documents)
        record = start_record(config.model_dir, record, is_chief(strategy))
        _check_divisible(record, strategy.num_replicas_in_sync)
        split = metadata.split("train")
        step = setup.build_step(
            record, (split.label_counts, split.documents), values, strategy,
            devices.should_jit(config.jit_compile, strategy),
        )  # fmt: skip
        selection = BestCheckpoint()
        checkpoints = Checkpoints(
            config.model_dir, _state(step, selection), config.keep_checkpoints, is_chief(strategy)
        )
        this = Run(config, record, stream, strategy, step, selection, checkpoints)
        this.resumed = _restore(this)
        if this.is_finished:
            print(
                f"{config.model_dir}: this run is finished; nothing to do. "
                f"The best {config.best_metric} is {selection.shown_best()}."
            )
            return
        _describe(this)
        for item in read:
            stack.enter_context(naming_damaged_shards(*item))
        _train(this, metadata, interruption)
    print(
        f"{config.model_dir}: trained on {this.documents} documents in {this.steps} steps; "
        f"best {config.best_metric} {selection.shown_best()}. Next: multihot "
        f"evaluate --model_dir={config.model_dir} --data_dir={config.data_dir}"
    )


def _check_divisible(record: RunRecord, replicas: int) -> None:
    if record.micro_batches_per_step % replicas:
        raise UserError(
            f"{record.train.model_dir}: this run takes {record.micro_batches_per_step} "
            f"micro-batches a step, which {replicas} replicas cannot share evenly; resume it on a "
            "number of replicas that divides them, or start another --model_dir"
        )


def _state(step: TrainStep, selection: BestCheckpoint) -> dict[str, dict[str, tf.Variable]]:
    """Every variable that a resumed run needs, by group and name."""
    state = {
        "model": step.model.named_variables(),
        "optimizer": step.optimizer.state(),
        "progress": vars(step.progress),
        "selection": vars(selection),
    }
    return state | ({"loss_scale": vars(step.loss_scale)} if step.loss_scale else {})


def _restore(this: Run) -> bool:
    """Restores the newest checkpoint, the same one on all workers; False if there is none yet."""
    resumed = this.checkpoints.restore()
    alone = devices.num_workers(this.strategy) == 1
    if not alone and not devices.is_same_everywhere(this.strategy, this.steps):
        raise UserError(
            f"{this.config.model_dir}: the workers see different checkpoints in it; expected one "
            "folder that all of them share, on a common disk or gs://"
        )
    return resumed


def _describe(this: Run) -> None:
    record, packing = this.record, this.record.packing
    sizes, replicas = record.model, this.strategy.num_replicas_in_sync
    groups = ", ".join(f"{rows} x {length}" for rows, length in packing.row_groups)
    print(
        f"{absolute(record.train.model_dir)}: "
        f"{f'resuming at step {this.steps}' if this.resumed else 'starting'}\n"
        f"  data: {this.stream.num_documents} documents, {len(record.labels)} labels\n"
        f"  model: {sizes.num_layers} layers of {sizes.hidden_size}, head {sizes.head}, "
        f"{record.precision} on {replicas} x {this.strategy.extended.worker_devices[0]}\n"
        f"  micro-batch: {packing.num_tokens} tokens in rows of {groups}; "
        f"{packing.max_documents} document slots; {record.micro_batches_per_step} a step",
        flush=True,
    )


def _train(this: Run, metadata: Metadata, interruption: Interruption | None) -> None:
    """Takes all steps, with checkpoints and evaluations where they are due."""
    evaluation = Evaluation(this.record, metadata, this.step, this.strategy)
    steps = _distribute_steps(this)
    # A run that was killed during its start left rows of step 0, which are written again.
    metrics_log = MetricsLog(
        this.config.model_dir, this.steps if this.resumed else -1, this.documents,
        this.record.total_documents, is_chief(this.strategy), this.config.progress,
    )  # fmt: skip
    began = this.steps
    if interruption is not None:
        interruption.on_request(lambda: _heed(this, evaluation, metrics_log, began))
    try:
        if not this.resumed:
            _start(this, metadata, metrics_log)
        while not this.is_finished:
            save_due = False
            if not int(this.selection.pending):
                save_due = _take_steps(this, steps, metrics_log)
            if int(this.selection.pending):
                _evaluate(this, evaluation, metrics_log)
                save_due = True
            if save_due:
                _save(this, metrics_log)
                metrics_log.restart_clock()
    finally:
        evaluation.changing.release()
        try:
            this.checkpoints.close()
        finally:
            metrics_log.close()


def _distribute_steps(this: Run) -> tf.data.Iterator:
    """This host's shard of every step, from where the run stands."""
    config, stream = this.config, this.stream
    micro_batches = read_micro_batches(
        stream,
        seed=config.seed,
        num_epochs=config.num_train_epochs,
        start=read_position(this.step.progress.position),
    )

    def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
        replicas = context.num_replicas_in_sync
        local = replicas // context.num_input_pipelines
        shard = input_pipeline.HostShard(replicas, context.input_pipeline_id * local, local)
        size = this.record.micro_batches_per_step
        return input_pipeline.shard_steps(micro_batches, stream, size, shard)

    if this.strategy.num_replicas_in_sync == 1 and devices.is_on_cpu(this.strategy):
        # No transfer to prepare. The strategy's iterator has an autotuning thread of its own, whose
        # end may be waited for (see `without_autotuning`).
        return iter(of_host(tf.distribute.InputContext()))
    return iter(this.strategy.distribute_datasets_from_function(of_host))


def _take_steps(this: Run, steps: tf.data.Iterator, metrics_log: MetricsLog) -> bool:
    """Takes steps until the host has something to do; True if a checkpoint is due then."""
    config, record, epoch_documents = this.config, this.record, this.stream.num_documents
    evaluations = int(this.selection.evaluations)
    evaluation = next_evaluation(record, epoch_documents, evaluations, this.documents)
    checkpoint = next_checkpoint(record, this.steps, this.documents)
    default_steps = 1 if devices.is_on_cpu(this.strategy) else _STEPS_PER_LOOP
    max_steps = min(config.steps_per_loop or default_steps, checkpoint.steps - this.steps)
    sums = this.step.run(
        steps,
        # Tensors, because other Python numbers would trace the loop again.
        tf.constant(max_steps, tf.int64),
        tf.constant(min(evaluation, checkpoint.documents), tf.int64),
    )
    on_host = {name: float(value) for name, value in sums.items()}
    slots = record.packing.num_tokens * record.micro_batches_per_step
    # No step is taken where a run with bad steps goes on with a lower --max_bad_steps.
    if on_host["steps"]:
        metrics_log.log_steps(this.steps, this.documents, on_host, slots, epoch_documents)
    if int(this.step.progress.bad_steps) >= config.max_bad_steps:
        _give_up(this)
    _check_not_dry(this, on_host)
    this.selection.pending.assign(int(this.documents >= evaluation))
    if on_host["stop"]:
        _stop(this, metrics_log)
    return this.steps >= checkpoint.steps or this.documents >= checkpoint.documents


def _start(this: Run, metadata: Metadata, metrics_log: MetricsLog) -> None:
    """Gives head and wide part their start; evaluated and saved, it is the checkpoint of step 0."""
    model = this.step.model
    start = find_head_start(this.record, metadata, model, this.strategy)
    if not start.fits:
        return
    setup.assign_values(model, start.values)
    this.step.optimizer.restart_average()
    metrics_log.log_head_start(start.documents, start.fits)
    this.selection.pending.assign(1)


def _evaluate(this: Run, evaluation: Evaluation, metrics_log: MetricsLog) -> None:
    """Measures, logs the metrics, and keeps the weights if they are the best."""
    try:
        metrics = evaluation.run()
    except StoppedError:
        _stop(this, metrics_log)
    metrics_log.log_evaluation(this.steps, this.documents, this.config.eval_split, metrics)
    if this.selection.update(this.config, metrics, is_of_start=not this.steps):
        with evaluation.averaged_weights():
            this.checkpoints.save_best(this.steps)


def _save(
    this: Run, metrics_log: MetricsLog, weights: Mapping[str, tf.Tensor] | None = None
) -> None:
    """Begins to save a checkpoint, once the rows that a resumed run expects are written."""
    metrics_log.flush()
    this.checkpoints.save(this.steps, weights)


def _heed(this: Run, evaluation: Evaluation, metrics_log: MetricsLog, began: int) -> None:
    """Stops a run that stood at step `began`, in a thread: within seconds where nothing is lost.

    TensorFlow may trace and compile the first step, or an evaluation, for minutes. Before the first
    step there is nothing to save, and during an evaluation all is there to be saved.
    """
    this.step.stop_requested.assign(True)
    if this.steps == began:
        end_process(
            f"{this.config.model_dir}: stopped as requested before the first step; run the same "
            "command again", RUN_AGAIN,
        )  # fmt: skip
    if devices.num_workers(this.strategy) > 1:  # They agree on where they stop.
        return
    time.sleep(_SECONDS_TO_STOP)
    with evaluation.changing:
        if evaluation.own_weights is None:  # The run has ended, and says how.
            return
        try:
            _stop(this, metrics_log, evaluation.own_weights)
        except (RunAgain, UserError) as error:
            end_process(str(error), error.exit_code)


def _stop(
    this: Run, metrics_log: MetricsLog, weights: Mapping[str, tf.Tensor] | None = None
) -> NoReturn:
    _save(this, metrics_log, weights)
    this.checkpoints.wait()
    raise RunAgain(
        f"{this.config.model_dir}: stopped as requested after step {this.steps}, and saved; run "
        "the same command again to go on"
    )


def _check_not_dry(this: Run, sums: dict[str, float]) -> None:
    if sums["steps"] and not sums["documents"]:
        raise UserError(
            f"{this.config.data_dir}: the shards hold fewer documents than metadata.json says "
            f"({this.documents} came of {this.record.total_documents}); prepare them again"
        )


def _give_up(this: Run) -> NoReturn:
    """Ends a run after too many bad steps, and writes down the documents of these."""
    config = this.config
    rows = _find_bad_documents(this)
    path = os.path.join(config.model_dir, BAD_STEPS_FILE)
    if is_chief(this.strategy):
        write_atomically(path, json.dumps(rows, indent=1) + "\n")
    raise UserError(
        f"{config.model_dir}: loss or gradient not finite in {len(rows)} steps in a row, from "
        f"step {rows[0]['step']} on; their documents are in {path}, and the last good checkpoint "
        "is kept; try a lower --learning_rate, another --precision, or remove those documents"
    )


def _find_bad_documents(this: Run) -> list[dict[str, Any]]:
    """For each of the last bad steps in a row, its number `step` and its `document_ids`."""
    # Strings do not travel to devices, so the ids are read again; the stream gives the same ones.
    progress, size = this.step.progress, this.record.micro_batches_per_step
    count = int(progress.bad_steps)
    micro_batches = read_micro_batches(
        this.stream,
        seed=this.config.seed,
        num_epochs=this.config.num_train_epochs,
        start=read_position(progress.bad_from),
    )
    ids = [
        [name.decode("utf-8", "replace") for name in batch["document_id"].numpy()[mask]]
        for batch in micro_batches.take(count * size)
        for mask in [batch["document_mask"].numpy() > 0]
    ]
    first = this.steps - count + 1
    return [
        {"step": first + index, "document_ids": list(itertools.chain(*ids[start : start + size]))}
        for index, start in enumerate(range(0, len(ids), size))
    ]


if __name__ == "__main__":
    from trainer.cli import main

    main(["train", *sys.argv[1:]])
