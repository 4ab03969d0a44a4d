#!/usr/bin/env bash
# From documents to a model folder, and from there to scores, on Google Cloud or on this machine's
# GPUs. `make tpu-train` and its like call this with their variables, which arrive as environment
# variables and are never read as shell.
#
# The same JOB goes on where it stopped: what is done is not done again, and training resumes.
# shellcheck disable=SC2153 # The capitals are make's.
set -euo pipefail

target="$1"
multihot=("$BIN/python" -m trainer.cli)

fail() {
    echo "make $target: error: $*" >&2
    exit 2
}

# VARIABLE...: ends if one has no value
need() {
    for variable in "$@"; do
        [ -n "${!variable}" ] ||
            fail "$variable is not set: make $target $variable=...; \`make\` lists the variables"
    done
}

region="${REGION:-${ZONE%-*}}"
bucket="${BUCKET#gs://}"
bucket="${bucket%/}"
# Beside the job's package, logs and state.
folder="gs://$bucket/multihot/$JOB"
# Words split at blanks, and by nothing else of the shell's.
read -r -a prepare_flags <<<"$PREPARE_FLAGS"
read -r -a train_flags <<<"$TRAIN_FLAGS"
read -r -a score_flags <<<"$SCORE_FLAGS"
read -r -a preflight_flags <<<"$PREFLIGHT_FLAGS"
read -r -a submit_flags <<<"$SUBMIT_FLAGS"
# Those that `submit check` has as well: they decide what is looked for.
check_flags=()
for flag in "${submit_flags[@]}"; do
    case "$flag" in
    --provisioning=* | --service_account=* | --network=* | --runtime_version=*)
        check_flags+=("$flag")
        ;;
    esac
done
[ -z "$DRY_RUN" ] || submit_flags+=(--dry_run)

# Sets steps: the commands that make a model folder in $folder, of documents or of $DATA.
plan_training() {
    local data="${DATA:-$folder/data}"
    steps=()
    if [ -z "$DATA" ]; then
        steps+=(prepare "--input=${INPUT:-sample:docstrings:20000}" "--data_dir=$data"
            "--tokenizer=$BERT" "--max_seq_length=$BERT_LENGTH" "${prepare_flags[@]}" --)
    fi
    steps+=(train "--data_dir=$data" "--model_dir=$folder/run" "--init_checkpoint=$BERT"
        "--num_train_epochs=$BERT_EPOCHS" "${train_flags[@]}" --
        evaluate "--data_dir=$data" "--model_dir=$folder/run" --
        export "--model_dir=$folder/run" "--export_dir=$folder/model")
}

# KIND FLAG... -- COMMANDS: submits, with what every submission is told
submit() {
    need PROJECT BUCKET
    "${multihot[@]}" submit "$1" "--project=$PROJECT" "--bucket=$bucket" "${@:2}"
}

# Sets where: the flags that say where jobs are looked for.
find_places() {
    need PROJECT
    where=("--project=$PROJECT" "--zone=$ZONE")
    [ -z "$REGION" ] || where+=("--region=$REGION")
}

case "$target" in
tpu-train)
    plan_training
    submit tpu "--zone=$ZONE" "--accelerator=${ACCELERATOR:-v5e:2x2}" "--name=$JOB" \
        "${submit_flags[@]}" -- "${steps[@]}"
    ;;
tpu-score)
    need INPUT
    submit tpu "--zone=$ZONE" "--accelerator=${ACCELERATOR:-v5e:2x2}" "--name=$JOB-score" \
        "--num_slices=$SLICES" "${submit_flags[@]}" -- \
        score "--model=${MODEL:-$folder/model}" "--input=$INPUT" \
        "--output_dir=${SCORES:-$folder/scores}" "${score_flags[@]}"
    ;;
vertex-train)
    plan_training
    submit vertex "--region=$region" "--accelerator=${ACCELERATOR:-l4}" \
        "--num_machines=$MACHINES" "--name=$JOB" "${submit_flags[@]}" -- "${steps[@]}"
    ;;
gpu-train)
    folder="runs/gpu/$JOB"
    plan_training
    # One command after the other.
    command=()
    for word in "${steps[@]}" --; do
        if [ "$word" != -- ]; then
            command+=("$word")
            continue
        fi
        if [ -n "$DRY_RUN" ]; then
            printf '%q ' multihot "${command[@]}"
            echo
        else
            "${multihot[@]}" "${command[@]}"
        fi
        command=()
    done
    ;;
preflight)
    "${multihot[@]}" preflight "--target=${TARGET:?}" "${preflight_flags[@]}"
    ;;
cloud-check)
    need PROJECT BUCKET
    find_places
    "${multihot[@]}" submit check "${where[@]}" "--bucket=$bucket" \
        "--accelerator=${ACCELERATOR:-v5e:2x2}" "${check_flags[@]}"
    ;;
tpu-status)
    find_places
    [ -z "$bucket" ] || where+=("--bucket=$bucket")
    "${multihot[@]}" jobs list "${where[@]}"
    ;;
tpu-clean)
    find_places
    "${multihot[@]}" jobs cancel "${where[@]}" --all
    ;;
*)
    fail "no such target"
    ;;
esac
