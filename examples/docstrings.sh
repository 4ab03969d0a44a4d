#!/usr/bin/env bash
# The whole way on the embedded sample: sample, prepare, train, evaluate, report, export, score.
# `make train` calls this with its variables. A step that is done is not done again; training resumes.
set -euo pipefail

multihot="$BIN/multihot"
settings="documents=$DOCUMENTS held_out=$HELD_OUT epochs=$EPOCHS hidden_size=$HIDDEN_SIZE \
num_layers=$NUM_LAYERS seed=$SEED"

mkdir -p "$OUTPUT"
if [ -e "$OUTPUT/settings" ] && [ "$(cat "$OUTPUT/settings")" != "$settings" ]; then
    echo "make train: $OUTPUT holds a run of other variables ($(cat "$OUTPUT/settings"));" \
        "remove it, or name another folder with OUTPUT=..." >&2
    exit 2
fi
echo "$settings" > "$OUTPUT/settings"

# The last ones are in no split: they stand for the documents that a user wants scored.
if [ ! -e "$OUTPUT/documents.jsonl" ]; then
    "$multihot" sample --num_documents="$((DOCUMENTS + HELD_OUT))" --seed="$SEED" \
        --output="$OUTPUT/sample.jsonl"
    tail -n "$HELD_OUT" "$OUTPUT/sample.jsonl" > "$OUTPUT/held_out.jsonl"
    head -n "$DOCUMENTS" "$OUTPUT/sample.jsonl" > "$OUTPUT/first.jsonl"
    mv "$OUTPUT/first.jsonl" "$OUTPUT/documents.jsonl"
fi

if [ ! -e "$OUTPUT/data/metadata.json" ]; then
    "$multihot" prepare --input="$OUTPUT/documents.jsonl" --data_dir="$OUTPUT/data" --seed="$SEED"
fi

"$multihot" train --data_dir="$OUTPUT/data" --model_dir="$OUTPUT/model" \
    --tokens_per_replica=2048 --hidden_size="$HIDDEN_SIZE" \
    --intermediate_size="$((4 * HIDDEN_SIZE))" --num_layers="$NUM_LAYERS" \
    --num_train_epochs="$EPOCHS" --seed="$SEED"

"$multihot" evaluate --model_dir="$OUTPUT/model" --data_dir="$OUTPUT/data"
"$multihot" report --model_dir="$OUTPUT/model" --data_dir="$OUTPUT/data"

if [ ! -e "$OUTPUT/export/multihot.json" ]; then
    "$multihot" export --model_dir="$OUTPUT/model" --export_dir="$OUTPUT/export"
fi

"$multihot" score --model="$OUTPUT/export" --input="$OUTPUT/held_out.jsonl" \
    --output_dir="$OUTPUT/scores" --scores=top:5

cat <<SUMMARY

Everything is in $OUTPUT:
  sample.jsonl              the documents; the next two are its parts
  documents.jsonl           those of the three splits
  held_out.jsonl            those that no split holds
  data/                     shards, tokenizer and metadata.json
  model/                    checkpoints, metrics.jsonl and TensorBoard events
  model/evaluation/         metrics.json: the test split, calibrated
  model/report.html         the same to look at, in any browser
  export/                   the model folder: Hugging Face files and a SavedModel
  scores/                   the scores of held_out.jsonl
SUMMARY
