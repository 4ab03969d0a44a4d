"""The settings of train, evaluate, report and export, without heavy imports for `--help`."""

import functools
from dataclasses import dataclass

from trainer.flags import CheckedConfig, changed_option, check_flag, option, parse_kind
from trainer.model_config import EncoderConfig, LossConfig, OptimizerConfig, parse_row_groups

DEFAULT_SEED = 17
STRATEGIES = ("auto", "tpu", "mirrored", "multi_worker", "one_device", "cpu")
# What runs the encoder when scoring, and in which precision.
TENSORFLOW, OPENVINO = ENGINES = ("tensorflow", "openvino")
SCORING_PRECISIONS = ("float32", "bfloat16", "int8")
JIT_INFERENCE_HELP = "XLA compilation of the forward pass in TensorFlow; auto: on GPUs."
BEST_METRICS = (
    "mean_average_precision", "micro_average_precision", "micro_f1", "macro_f1", "loss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProgressConfig(CheckedConfig):
    """The flag of the commands that show their progress."""

    progress: str = option(
        "auto",
        "Progress on standard error. bar: a bar; lines: a line at most every 30 seconds; auto: a "
        "bar on a terminal, else lines; none: nothing.",
        choices=("auto", "bar", "lines", "none"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig(EncoderConfig):
    """The flags of the training step, which `train` and `preflight` share."""

    init_checkpoint: str | None = option(
        None, "Folder or hub id of a pretrained BERT; default: from scratch."
    )
    head_start: str = option(
        "fit",
        "How the head starts. fit: at a logistic regression on the training documents' vectors as "
        "the checkpoint gives them; random: at random, as always from scratch.",
        choices=("fit", "random"),
    )
    head_start_documents: int = option(
        50_000,
        "Most training documents that head and wide part are fitted to before the first step.",
        at_least=1,
        unit="document",
    )
    tokens_per_replica: int = option(
        4096,
        "Tokens of a micro-batch, padding included.",
        at_least=1,
        at_most=2**24,
        expected="1 to 2^24 tokens",
    )
    row_groups: str | None = option(
        None,
        "Rows of a micro-batch as ROWSxLENGTH,...; default: from the lengths of the data.",
        check=parse_row_groups,
    )
    gradient_accumulation: int = option(
        1, "Micro-batches a replica takes before an update.", at_least=1
    )
    num_train_epochs: float = option(3.0, "Passes over the training split.", above=0, unit="epochs")
    objective: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def start(self) -> tuple[str, str] | None:
        """The flag, and its value, that names what the encoder starts from; None from scratch."""
        return None if self.init_checkpoint is None else ("init_checkpoint", self.init_checkpoint)

    @property
    def chosen_row_groups(self) -> tuple[tuple[int, int], ...] | None:
        """`--row_groups`, parsed; None leaves the choice to the lengths of the data."""
        return parse_row_groups(self.row_groups) if self.row_groups else None


@dataclass(frozen=True)
class TeacherConfig(CheckedConfig):
    """The flags of a student that learns from the scores of another model."""

    teacher: str | None = option(
        None,
        "Model folder that `multihot export` wrote, whose scores of the training documents this "
        "model learns too. Without --init_checkpoint the model also starts from its layers: "
        "--num_layers says how many.",
    )
    teacher_input: tuple[str, ...] = option(
        (),
        "Further documents to learn the teacher's scores of, without their labels, if they have "
        "any: files, globs or folders, local or gs://, of the formats of `score`, "
        "comma-separated. Their columns are `text` and `id`.",
    )
    distill_alpha: float = option(
        0.5,
        "Share of the loss that goes by the teacher's scores; the rest goes by the labels, which "
        "--teacher_input has none of.",
        at_least=0,
        at_most=1,
        expected="a share from 0 to 1",
    )
    distill_temperature: float = option(
        2.0,
        "What the logits of both models are divided by before they are compared; above 1, small "
        "probabilities count more.",
        above=0,
        at_most=1000,
        expected="a number above 0 and at most 1000",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.teacher is not None or not self.teacher_input
        self.expect(fits, "teacher_input", "none without --teacher")


@dataclass(frozen=True)
class DeviceConfig(CheckedConfig):
    """The flags of the devices that `train` and `score` run on."""

    strategy: str = option(
        "auto",
        "Devices to run on. auto: several workers if TF_CONFIG or Slurm names them, else a TPU, "
        "else all GPUs, else the CPU.",
        choices=STRATEGIES,
    )
    tpu: str | None = option(
        None, "TPU to take: local, a TPU VM's name, or grpc://HOST:PORT; default: a local one."
    )
    cpu_replicas: int = option(
        1,
        "Replicas that --strategy=mirrored makes of the CPU on a machine without GPUs.",
        at_least=1,
        unit="replica",
    )


@dataclass(frozen=True)
class RunConfig(CheckedConfig):
    """The folders of a training run and of its data."""

    model_dir: str = option("", "Folder of a training run.", required=True)
    data_dir: str | None = option(
        None, "Folder that `multihot prepare` wrote; default: the one that training read."
    )


@dataclass(frozen=True)
class TrainConfig(TrainStepConfig, TeacherConfig, DeviceConfig, ProgressConfig, RunConfig):
    """`multihot train`: shards to checkpoints."""

    model_dir: str = changed_option(
        RunConfig, "model_dir", help="Folder for checkpoints and metrics; the same one resumes."
    )
    data_dir: str = changed_option(
        RunConfig, "data_dir", "", help="Folder that `multihot prepare` wrote.", required=True
    )
    start_timeout: float = option(
        300.0,
        "Seconds that a worker waits at the start for the others to appear.",
        above=0,
        unit="seconds",
    )
    max_restarts: int = option(
        0,
        "Times to start again, and resume, after the run ended otherwise than by itself.",
        at_least=0,
    )
    max_bad_steps: int = option(
        20, "Steps in a row with a non-finite loss or gradient before the run stops.", at_least=1
    )
    precision: str = option(
        "auto",
        "auto: bfloat16 on TPUs and GPUs of compute capability 8.0 and up, float16 on older GPUs, "
        "float32 on CPUs.",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    )
    jit_compile: str = option(
        "auto",
        "XLA compilation of the step; auto: yes, except on TPU hosts. Validation is compiled on "
        "GPUs alone then.",
        choices=("auto", "true", "false"),
    )
    pos_weight: str = option(
        "none",
        "Weights of positives: none, balanced (negatives/positives), balanced_classes (the same, "
        "and negatives weigh documents/(2 negatives), as scikit-learn's 'balanced'), sqrt (the "
        "root of balanced), effective (Cui et al. 2019), or a JSON file of {label: weight}.",
    )
    max_pos_weight: float = option(100.0, "Cap on every positive weight.", at_least=1)
    steps_per_loop: int | None = option(
        None,
        "Steps between two looks of the host at the device; default: 1 on a CPU, else 20.",
        at_least=1,
        unit="step",
    )
    checkpoint_every: int | None = option(
        None, "Steps between checkpoints; default: every tenth of the run.", at_least=1, unit="step"
    )
    keep_checkpoints: int = option(3, "Newest checkpoints to keep beside the best.", at_least=1)
    evaluate_every: float = option(
        1.0, "Epochs between evaluations on --eval_split.", above=0, unit="epochs"
    )
    eval_split: str = option("validation", "Split of the evaluations while training.")
    best_metric: str = option(
        "mean_average_precision", "Metric that picks the best checkpoint.", choices=BEST_METRICS
    )
    patience: int = option(
        0,
        "Evaluations without a better metric before stopping; 0 = never.",
        at_least=0,
        unit="evaluations",
    )
    seed: int = option(
        DEFAULT_SEED,
        "Seed of initial weights, shuffling and dropout.",
        at_least=0,
        below=2**31,
        expected="a number in [0, 2^31)",
    )

    @property
    def start(self) -> tuple[str, str] | None:
        """As of `TrainStepConfig`; without --init_checkpoint the teacher, if there is one."""
        return super().start or (None if self.teacher is None else ("teacher", self.teacher))


@functools.cache
def parse_threshold_for(text: str) -> tuple[str, float]:
    """`--threshold_for` as kind (overall_f1, f1, precision or recall) and level (0 for F1)."""
    kind, level = parse_kind(text)
    if level is None:
        valid, level = kind in ("overall_f1", "f1"), 0.0
    else:
        valid = kind in ("precision", "recall") and 0 < level <= 1
    expected = "overall_f1, f1, precision:P or recall:R with P and R above 0 and at most 1"
    check_flag(valid, "threshold_for", text, expected)
    return kind, level


@dataclass(frozen=True)
class EvaluateConfig(RunConfig):
    """`multihot evaluate`: best checkpoint to metrics, calibration and thresholds."""

    data_dir: str = changed_option(
        RunConfig, "data_dir", "", help="Folder that `multihot prepare` wrote.", required=True
    )
    calibration_split: str = option("validation", "Split that fits calibration and thresholds.")
    split: str = option("test", "Split to report on.")
    min_support: int | None = option(
        None,
        "Positives below which a label takes the global threshold; default: 1 for "
        "--threshold_for=overall_f1, which also counts on probabilities, and 10 for the others.",
        at_least=1,
        unit="document",
    )
    calibrate: str = option(
        "labels",
        "What to fit: a scale and shift a label, one for all "
        "labels, or none; positive weights are taken back all the same where that is exact.",
        choices=("labels", "global", "none"),
    )
    threshold_for: str = option(
        "overall_f1",
        "What thresholds are best for. overall_f1: macro- and micro-F1 together; f1: each label's "
        "own, which predicts labels that the model hardly knows for very many documents; "
        "precision:P: the largest recall at a precision of at least P; recall:R: the largest "
        "precision at a recall of at least R. A label that no cut takes there is never predicted.",
        check=parse_threshold_for,
    )
    thresholds: str = option(
        "labels",
        "Whether each label has a threshold of its own, or all share a global one.",
        choices=("labels", "global"),
    )
    exact_memory: float = option(
        4.0,
        "GiB for exact metrics (100 bytes for each document and label of both splits); larger "
        "splits are read twice and measured in bins of scores, with bounds on the error, in "
        "memory that does not grow with the documents.",
        at_least=0,
        expected="0 GiB or more",
    )
    resamples: int = option(
        1000,
        "Resamples for confidence intervals, fewer for large splits; 0: no intervals.",
        at_least=0,
    )
    precision: str = option(
        "float32",
        "Precision of scoring to measure beside float32, with thresholds of its own: bfloat16 "
        "(processors with AMX) or int8 (VNNI), both by OpenVINO. `score --precision=int8` needs "
        "it: the steps of the integers are chosen here, by documents of --calibration_split.",
        choices=SCORING_PRECISIONS,
    )
    jit_compile: str = option("auto", JIT_INFERENCE_HELP, choices=("auto", "true", "false"))
    force: bool = option(
        False, "Measure a precision that this processor has no fast instructions for."
    )
    baseline_documents: int = option(
        10_000,
        "Most documents of each split that the TF-IDF baseline reads (10,000 with 128 labels take "
        "up to a minute, once); 0 leaves the baseline out.",
        at_least=0,
        unit="documents",
    )

    @property
    def threshold_target(self) -> tuple[str, float]:
        """`--threshold_for`, parsed: kind and level."""
        return parse_threshold_for(self.threshold_for)

    @property
    def own_min_support(self) -> int:
        """Positives that a label needs for a threshold of its own."""
        if self.min_support is not None:
            return self.min_support
        return 1 if self.threshold_target[0] == "overall_f1" else 10


@dataclass(frozen=True)
class ReportConfig(RunConfig):
    """`multihot report`: an evaluation to one page, report.html in the model folder."""

    model_dir: str = changed_option(
        RunConfig, "model_dir", help="Folder of a run that `multihot evaluate` measured."
    )


@dataclass(frozen=True)
class ExportConfig(RunConfig):
    """`multihot export`: best checkpoint to a model folder."""

    export_dir: str = option(
        "",
        "Model folder to write; must not exist, be empty, or be this export's already.",
        required=True,
    )
    uncalibrated: bool = option(False, "Export without a calibration of this checkpoint.")
    formats: tuple[str, ...] = option(
        ("saved_model",),
        "Formats beside that of transformers, comma-separated: saved_model, which is always "
        "written, and onnx.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = set(self.formats) <= {"saved_model", "onnx"}
        self.expect(known, "formats", "saved_model, or saved_model,onnx")

    @property
    def has_onnx(self) -> bool:
        """Whether the folder gets an ONNX graph."""
        return "onnx" in self.formats
