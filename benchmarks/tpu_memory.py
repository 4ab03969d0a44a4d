"""Compiles the train, evaluation and scoring steps for TPUs and prints what a chip needs.

No TPU takes part: the figures are the compiler's.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from launch.accelerators import GIB, default_topology, parse_target
from launch.preflight.compilation import compile_programs
from launch.preflight.job_shape import JobShape
from launch.preflight.lowering import lower_steps
from trainer.model_config import ModelConfig, PackingConfig, parse_row_groups
from trainer.run_config import TrainConfig

# BERT-base's vocabulary and width.
_VOCAB_SIZE, _HIDDEN_SIZE, _HEADS, _INTERMEDIATE_SIZE = 30522, 768, 12, 3072


def main() -> None:
    """Compiles every step for every target, the smallest program first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(map(default_topology, ("v5e", "v5p", "v6e"))))
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--num_labels", type=int, default=100)
    parser.add_argument("--row_groups", default="128x128", help="of a replica's micro-batch")
    parser.add_argument("--tokens_per_document", type=int, default=32, help="gives the slots")
    arguments = parser.parse_args()
    model = ModelConfig(
        vocab_size=_VOCAB_SIZE,
        num_labels=arguments.num_labels,
        hidden_size=_HIDDEN_SIZE,
        num_layers=arguments.num_layers,
        num_attention_heads=_HEADS,
        intermediate_size=_INTERMEDIATE_SIZE,
    )
    groups = parse_row_groups(arguments.row_groups)
    tokens = sum(rows * length for rows, length in groups)
    slots = tokens // arguments.tokens_per_document
    packing = PackingConfig(groups, slots, slots)
    shape = JobShape(
        model, packing, packing, max_labels=32, tokens_per_document=arguments.tokens_per_document,
        num_documents=1_000_000,
    )  # fmt: skip
    config = TrainConfig(data_dir="none", model_dir="none", precision="mixed_bfloat16")
    print(f"{tokens} tokens a replica in rows of {arguments.row_groups}, {model}", flush=True)
    for target in map(parse_target, arguments.targets.split(",")):
        programs = lower_steps(config, shape, target.chips)
        for name in ("score", "evaluate", "train"):
            compiled = compile_programs({name: programs[name]}, target)[name]
            print(
                f"{target.topology} {name}: {compiled} ({target.hbm_bytes / GIB:.2f} GiB there)",
                flush=True,
            )


if __name__ == "__main__":
    main()
