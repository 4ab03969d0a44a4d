"""`multihot train`: shards to checkpoints, the run as one story from top to bottom.

Which documents a run met in the steps whose loss or gradient was not finite.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import tensorflow as tf

from trainer.config import absolute
from trainer.data.input_pipeline import (
    HostShard,
    Stream,
    open_stream,
    read_micro_batches,
    shard_steps,
)
from trainer.data.metadata import load_metadata, naming_damaged_shards
from trainer.data.packing import add_histograms, choose_packing
from trainer.errors import RunAgain, UserError
from trainer.model.predictor import StoppedError
from trainer.run_config import TrainConfig
from trainer.runtime.devices import (
    choose_precision,
    is_chief,
    is_on_cpu,
    is_same_everywhere,
    make_strategy,
    num_workers,
    should_jit,
    watching_workers,
)
from trainer.runtime.interruption import Interruption
from trainer.storage.filesystem import write_atomically
from trainer.training.checkpoint import Checkpoints
from trainer.training.metrics_log import MetricsLog
from trainer.training.run_record import RunRecord, start_record
from trainer.training.selection import BestCheckpoint, Evaluation, Milestones
from trainer.training.setup import build_step, check_tokenizer, choose_model, make_record
from trainer.training.step import TrainProgress, TrainStep, read_position

BAD_STEPS_FILE = "bad_steps.json"


def find_bad_documents(
    stream: Stream,
    seed: int,
    num_epochs: float,
    progress: TrainProgress,
    micro_batches_per_step: int,
) -> list[dict[str, Any]]:
    """Reads the bad steps that a run stands at the end of once more, for their documents' ids.

    Ids are strings, which do not travel to devices; the stream gives the same documents again.

    Args:
      stream, seed, num_epochs: what the run reads, as `read_micro_batches` takes them.
      progress: the run's, after at least one bad step.
      micro_batches_per_step: K.

    Returns:
      For each of the last bad steps in a row, its number `step` and its `document_ids`.
    """
    count, size = int(progress.bad_steps), micro_batches_per_step
    micro_batches = read_micro_batches(
        stream, seed=seed, num_epochs=num_epochs, start=read_position(progress.bad_from)
    )
    ids = [
        [name.decode("utf-8", "replace") for name in batch["document_id"].numpy()[mask]]
        for batch in micro_batches.take(count * size)
        for mask in [batch["document_mask"].numpy() > 0]
    ]
    first = int(progress.steps) - count + 1
    return [
        {"step": first + index, "document_ids": list(itertools.chain(*ids[start : start + size]))}
        for index, start in enumerate(range(0, len(ids), size))
    ]


_STEPS_PER_LOOP = 20


@dataclass(frozen=True)
class Run:
    """All that a run consists of, once it is built."""

    config: TrainConfig
    record: RunRecord
    stream: Stream
    strategy: tf.distribute.Strategy
    step: TrainStep
    selection: BestCheckpoint
    checkpoints: Checkpoints

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

    Args:
      config: the command's flags.
      interruption: tells of requests to stop; default: there are none.

    Raises:
      UserError: for anything about the data, the checkpoint or the flags that the user can mend.
      RunAgain: if the run was stopped, or lost a worker; it goes on when it is run again.
    """
    metadata = load_metadata(config.data_dir)
    check_tokenizer(config.data_dir, metadata)
    split = metadata.split("train")
    windows = [split.window_histogram, metadata.split(config.eval_split).window_histogram]
    packing = choose_packing(
        split.length_histogram, config.tokens_per_replica, config.chosen_row_groups,
        metadata.max_seq_length,
        split.window_histogram, len(add_histograms(windows)) - 1,
    )  # fmt: skip
    stream = open_stream(config.data_dir, metadata, "train", packing)
    # Opened only to find a damaged split now and not after an epoch.
    open_stream(config.data_dir, metadata, config.eval_split, packing)
    sizes, values = choose_model(config, metadata)
    # Before anything else that TensorFlow executes: several workers have to find each other first.
    strategy = make_strategy(config)
    with watching_workers(strategy):
        record = start_record(
            config.model_dir,
            make_record(
                config, metadata, sizes, packing,
                choose_precision(config.precision, strategy), strategy.num_replicas_in_sync,
            ),
            is_chief(strategy),
        )  # fmt: skip
        _check_divisible(record, strategy.num_replicas_in_sync)
        jit_compile = should_jit(config.jit_compile, strategy)
        step = build_step(record, metadata, values, strategy, jit_compile)
        selection = BestCheckpoint.fresh()
        checkpoints = Checkpoints(
            config.model_dir, _state(step, selection), config.keep_checkpoints, is_chief(strategy)
        )
        this = Run(config, record, stream, strategy, step, selection, checkpoints)
        resumed = _restore(this)
        best = f"best {config.best_metric}"
        if this.is_finished:
            print(
                f"{config.model_dir}: this run is finished; nothing to do. "
                f"The {best} is {selection.shown_best()}."
            )
            return
        _describe(this, int(step.progress.steps) if resumed else None)
        if interruption is not None:
            interruption.on_request(lambda: step.stop_requested.assign(True))
        evaluation = Evaluation(record, metadata, step, strategy)
        with naming_damaged_shards(config.data_dir, metadata, "train", config.eval_split):
            _train(this, evaluation)
    print(
        f"{config.model_dir}: trained on {this.documents} documents in "
        f"{int(step.progress.steps)} steps; {best} {selection.shown_best()}. Next: multihot "
        f"evaluate --model_dir={config.model_dir} --data_dir={config.data_dir}"
    )


def _restore(this: Run) -> bool:
    """Restores the newest checkpoint; False if there is none yet.

    Raises:
      UserError: if none can be read, or not all workers read the same one.
    """
    resumed = this.checkpoints.restore()
    step = int(this.step.progress.steps)
    if num_workers(this.strategy) > 1 and not is_same_everywhere(this.strategy, step):
        raise UserError(
            f"{this.config.model_dir}: the workers see different checkpoints in it; expected one "
            "folder that all of them share, on a common disk or gs://"
        )
    return resumed


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


def _deal(this: Run) -> tf.data.Iterator:
    """This host's share of every step from where the run stands."""
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
        share = HostShard(replicas, context.input_pipeline_id * local, local)
        return shard_steps(micro_batches, stream, this.record.micro_batches_per_step, share)

    return iter(this.strategy.distribute_datasets_from_function(of_host))


def _train(this: Run, evaluation: Evaluation) -> None:
    """Loops of steps, with a checkpoint and an evaluation where they are due."""
    config, step, progress = this.config, this.step, this.step.progress
    steps, documents = int(progress.steps), this.documents
    iterator = _deal(this)
    slots = this.stream.packing.num_tokens * this.record.micro_batches_per_step
    steps_per_loop = config.steps_per_loop or (1 if is_on_cpu(this.strategy) else _STEPS_PER_LOOP)
    milestones = Milestones.of(
        config, this.stream.num_documents, this.record.total_documents, steps_per_loop
    )
    metrics_log = MetricsLog(
        config.model_dir, steps, documents, milestones.total_documents, is_chief(this.strategy)
    )
    try:
        while not this.is_finished:
            evaluations, before = int(this.selection.evaluations), documents
            if not int(this.selection.pending):
                max_steps, until = milestones.next_stop(steps, documents, evaluations)
                sums = step.run(
                    iterator, tf.constant(max_steps, tf.int64), tf.constant(until, tf.int64)
                )
                on_host = {name: float(value) for name, value in sums.items()}
                steps, documents = int(progress.steps), this.documents
                metrics_log.log_steps(steps, documents, on_host, slots, this.stream.num_documents)
                if int(progress.bad_steps) >= config.max_bad_steps:
                    _give_up(this)
                _check_not_dry(this, on_host)
                due = documents >= milestones.next_evaluation(evaluations)
                this.selection.pending.assign(int(due))
                if on_host["stop"]:
                    _stop(this, metrics_log)
            evaluated = bool(int(this.selection.pending))
            if evaluated:
                _evaluate(this, evaluation, metrics_log)
            if evaluated or milestones.is_checkpoint_due(steps, documents, before):
                _save(this, metrics_log)
                metrics_log.restart_clock()
    finally:
        try:
            this.checkpoints.close()
        finally:
            metrics_log.close()


def _evaluate(this: Run, evaluation: Evaluation, metrics_log: MetricsLog) -> None:
    """Measures, writes down what it found, and keeps the weights if they are the best."""
    steps = int(this.step.progress.steps)
    try:
        metrics = evaluation.run()
    except StoppedError:
        _stop(this, metrics_log)
    metrics_log.log_evaluation(steps, this.documents, this.config.eval_split, metrics)
    if this.selection.update(this.config, metrics):
        with evaluation.averaged_weights():
            this.checkpoints.save_best(steps)


def _save(this: Run, metrics_log: MetricsLog) -> None:
    """Begins to save where the run stands, after the rows that a resumed run expects there."""
    metrics_log.flush()
    this.checkpoints.save(int(this.step.progress.steps))


def _stop(this: Run, metrics_log: MetricsLog) -> NoReturn:
    """Saves where the run stands and ends it.

    Raises:
      RunAgain: always.
    """
    _save(this, metrics_log)
    this.checkpoints.wait()
    raise RunAgain(
        f"{this.config.model_dir}: stopped as requested after step "
        f"{int(this.step.progress.steps)}, and saved; run the same command again to go on"
    )


def _check_not_dry(this: Run, sums: dict[str, float]) -> None:
    """Raises UserError if the stream ended before all documents came."""
    if sums["steps"] and not sums["documents"]:
        raise UserError(
            f"{this.config.data_dir}: the shards hold fewer documents than metadata.json says "
            f"({this.documents} came of {this.record.total_documents}); prepare them again"
        )


def _give_up(this: Run) -> NoReturn:
    """Ends a run whose numbers went wrong, and writes down which documents it met there.

    Raises:
      UserError: always.
    """
    config, progress = this.config, this.step.progress
    rows = find_bad_documents(
        this.stream, config.seed, config.num_train_epochs, progress,
        this.record.micro_batches_per_step,
    )  # fmt: skip
    path = os.path.join(config.model_dir, BAD_STEPS_FILE)
    if is_chief(this.strategy):
        write_atomically(path, json.dumps(rows, indent=1) + "\n")
    raise UserError(
        f"{config.model_dir}: loss or gradient not finite in {len(rows)} steps in a row, from "
        f"step {rows[0]['step']} on; their documents are in {path}, and the last good checkpoint "
        "is kept; try a lower --learning_rate, another --precision, or remove those documents"
    )


def _describe(this: Run, step: int | None) -> None:
    """Says what runs where; `step` is the one it resumes at, None for a new run."""
    record, packing = this.record, this.record.packing
    sizes, replicas = record.model, this.strategy.num_replicas_in_sync
    groups = ", ".join(f"{rows} x {length}" for rows, length in packing.row_groups)
    print(
        f"{absolute(record.train.model_dir)}: "
        f"{'starting' if step is None else f'resuming at step {step}'}\n"
        f"  data: {this.stream.num_documents} documents, {len(record.labels)} labels\n"
        f"  model: {sizes.num_layers} layers of {sizes.hidden_size}, head {sizes.head}, "
        f"{record.precision} on {replicas} x {this.strategy.extended.worker_devices[0]}\n"
        f"  micro-batch: {packing.num_tokens} tokens in rows of {groups}; "
        f"{packing.max_documents} document slots; {record.micro_batches_per_step} a step",
        flush=True,
    )


if __name__ == "__main__":
    from trainer.cli import main

    main(["train", *sys.argv[1:]])
