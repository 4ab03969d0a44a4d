#!/usr/bin/env bash
# The whole way on the embedded sample: prepare, train, evaluate, report, export, score. `make
# train` calls this with its variables. A step that is done is not done again; training resumes.
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

if [ ! -e "$OUTPUT/data/metadata.json" ]; then
    "$multihot" prepare --input="sample:docstrings:$DOCUMENTS" --data_dir="$OUTPUT/data" \
        --seed="$SEED"
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

# The sample takes source files in a fixed order, so the last of a longer one are new documents.
if [ ! -e "$OUTPUT/held_out.jsonl" ]; then
    "$multihot" sample --num_documents="$((DOCUMENTS + HELD_OUT))" --seed="$SEED" \
        --output="$OUTPUT/longer_sample.jsonl"
    tail -n "$HELD_OUT" "$OUTPUT/longer_sample.jsonl" > "$OUTPUT/held_out.jsonl"
    rm "$OUTPUT"/longer_sample.jsonl*
fi

"$multihot" score --model="$OUTPUT/export" --input="$OUTPUT/held_out.jsonl" \
    --output_dir="$OUTPUT/scores" --scores=top:5

cat <<SUMMARY

Everything is in $OUTPUT:
  data/                     shards, tokenizer and metadata.json
  model/                    checkpoints, metrics.jsonl and TensorBoard events
  model/evaluation/         metrics.json: the test split, calibrated
  model/report.html         the same to look at, in any browser
  export/                   the model folder: Hugging Face files and a SavedModel
  held_out.jsonl, scores/   documents that no split held, and their scores
SUMMARY
