#!/bin/bash
# Runs a job on a host of a Cloud TPU slice, and deletes the slice when the job has ended.
#
# This text is the startup script of every slice. The job is data in the machine's metadata, and no
# shell ever reads any part of it as code. The watchdog starts first, before anything is known of
# the job: it deletes the slice when its time is over, whatever happens to the rest, and shuts the
# machine down if the deletion is refused. A machine that is taken away (SIGTERM) deletes nothing,
# so that `submit` sees that it was taken away. If the machine starts again, so does this script,
# with the old deadline.
#
# GCE_METADATA_HOST, STORAGE_EMULATOR_HOST and MULTIHOT_TPU_URL name other servers, MULTIHOT_WORK
# another folder, MULTIHOT_CONSOLE another console and MULTIHOT_SITE_PACKAGES installed dependencies
# to use, and MULTIHOT_SPEED is how often faster than others this machine's clock runs: for tests.
set -uo pipefail
umask 077

metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance"
storage="${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}"
tpu_api="${MULTIHOT_TPU_URL:-https://tpu.googleapis.com}"
work="${MULTIHOT_WORK:-/var/lib/multihot}"
console="${MULTIHOT_CONSOLE:-/dev/console}"
speed="${MULTIHOT_SPEED:-1}"
# How long a machine may take to learn its job, and how long it asks for its deletion before it
# shuts itself down. It does so no earlier than their sum after its start: a machine that is gone
# looks taken away to `submit`, which deletes one that stays silent for 20 minutes.
boot_seconds=900
delete_seconds=600
pause_seconds=30
retries=3
resource="" bucket="" folder="" submission="" attempt=0 host=0
stopping=""
child=""

# Seconds since 1970.
now() {
  echo "$(($(date +%s%3N) * speed / 1000))"
}

# SECONDS: sleeps
rest() {
  local milliseconds=$(($1 * 1000 / speed))
  sleep "$((milliseconds / 1000)).$(printf %03d "$((milliseconds % 1000))")"
}

# COMMAND...: runs it until it succeeds, at most six times
persist() {
  local seconds
  for seconds in 1 2 4 8 16; do
    "$@" && return
    rest "$seconds"
  done
  "$@"
}

# PATH below instance/
read_metadata() {
  curl --silent --fail --noproxy '*' --max-time 10 --retry "$retries" --retry-delay 1 \
    --header 'Metadata-Flavor: Google' "$metadata/$1"
}

# NAME DEFAULT: an attribute of the machine
attribute() {
  read_metadata "attributes/$1" 2>/dev/null || printf '%s' "$2"
}

# Learns which slice this is, and where its job's folder lies.
read_place() {
  resource="$(read_metadata attributes/multihot-resource)" || return
  bucket="$(attribute multihot-bucket '')"
  folder="$(attribute multihot-folder '')"
  submission="$(attribute multihot-submission '')"
  attempt="$(attribute multihot-attempt 0)"
  host="$(attribute agent-worker-number 0)"
}

# CURL_ARGUMENT...: a request to Google as this machine's account. The token travels by standard
# input, so that no list of processes shows it.
call() {
  local token
  token="$(read_metadata service-accounts/default/token |
    sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')"
  printf 'Authorization: Bearer %s\n' "$token" |
    curl --silent --show-error --fail --max-time 120 --header @- "$@"
}

# FILE NAME: uploads a file to the job's folder
upload() {
  local name="$folder/$2"
  call --request POST --header 'Content-Type: application/octet-stream' --data-binary "@$1" \
    "$storage/upload/storage/v1/b/$bucket/o?uploadType=media&name=${name//\//%2F}" >/dev/null
}

delete_slice() {
  call --request DELETE "$tpu_api/v2/$resource?force=true" >/dev/null
}

# EXIT_CODE REASON: writes how this host ended to the bucket, unless the job has done so itself
record_exit_code() {
  [[ -s $work/exit_code.json ]] ||
    printf '{"submission": "%s", "attempt": %d, "host": %d, "exit_code": %d, "reason": "%s"}\n' \
      "$submission" "$attempt" "$host" "$1" "$2" >"$work/exit_code.json"
  upload "$work/exit_code.json" "exit_code/host-$host"
}

# TIME: the watchdog acts then. Without the file it acts at once, as where a disk is full.
set_limit() {
  { echo "$1" >"$work/limit.new" && mv "$work/limit.new" "$work/limit"; } || rm -f "$work/limit"
}

# SENTENCE: says on the serial console, which needs no right to any bucket, what only a person can
# mend
plead() {
  local project zone name remedy="gcloud compute tpus queued-resources list"
  if [[ -n $resource ]]; then
    IFS=/ read -r _ project _ zone _ name <<<"$resource"
    remedy="gcloud compute tpus queued-resources delete $name --force --zone=$zone"
    remedy+=" --project=$project"
  fi
  printf 'multihot: %s; delete it: %s\n' "$1" "$remedy" 2>/dev/null >>"$console"
}

# Ends what this machine does, and the machine.
shut_down() {
  local job
  plead "this slice could not delete itself, so its machine shuts down, and may go on billing"
  if [[ ! -e $work/ended ]]; then
    job="$(<"$work/job.pid")" && kill -KILL -- "-$job"
    kill -KILL "$$"
  fi
  shutdown --poweroff now || poweroff --force
}

# Sleeps until the deadline, and then requests the deletion again and again until this machine is
# deleted, or shuts it down. The job ends at the deadline in any case.
watch() {
  local end why="the time of --max_hours was over"
  trap '' HUP INT TERM
  # The kernel kills this process last when memory runs out.
  { echo -1000 >"/proc/$BASHPID/oom_score_adj"; } 2>/dev/null
  while (($(now) < $(<"$work/limit"))); do rest 5; done
  retries=0
  end=$(($(now) + delete_seconds))
  if ((end < boot_limit + delete_seconds)); then end=$((boot_limit + delete_seconds)); fi
  if [[ ! -e $work/ended ]]; then
    cmp --silent "$work/limit" "$work/deadline" || why="the machine did not learn its job in time"
    if read_place; then record_exit_code 124 "$why"; fi
    kill -TERM "$$" 2>/dev/null
  fi
  while true; do
    if [[ -n $resource ]] || read_place; then
      if delete_slice; then
        rest "$pause_seconds"
      else
        plead "this slice was refused its own deletion, and goes on billing"
      fi
    else
      plead "this machine cannot learn which slice it is, and goes on billing"
    fi
    if (($(now) >= end)); then shut_down; fi
    rest "$pause_seconds"
  done
}

# shellcheck disable=SC2317 # A trap calls it.
finish() {
  local code=$?
  trap '' TERM
  if [[ -n $resource ]]; then
    upload "$work/startup.log" "logs/host-$host/$submission-$(printf %03d "$attempt")-startup.log"
  fi
  if [[ -n $stopping ]]; then return; fi
  touch "$work/ended"
  record_exit_code "$code" "the startup script ended"
  delete_slice
  # If that was refused, the watchdog repeats it.
  set_limit "$(now)"
}

# shellcheck disable=SC2317 # A trap calls it.
stop() {
  stopping=1
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi
}

# A full or broken disk must not keep the watchdog from starting.
if ! { mkdir -p "$work" && cd "$work" && : >>startup.log; }; then
  work=/dev/shm/multihot
  if ! { mkdir -p "$work" && cd "$work"; }; then shutdown --poweroff now; fi
fi
# Google's agent may start this script without HOME, which installers of packages need.
export HOME="${HOME:-$work}"
exec >>"$work/startup.log" 2>&1
rm -f "$work/exit_code.json" "$work/ended" "$work/job.pid"
boot_limit="$(($(now) + boot_seconds))"
deadline="$(cat "$work/deadline" 2>/dev/null)"
set_limit "$((${deadline:-$boot_limit} < boot_limit ? deadline : boot_limit))"
watch </dev/null >>"$work/watchdog.log" 2>&1 &
echo $! >"$work/watchdog.pid"
trap finish EXIT
trap stop TERM
until read_place; do
  rest "$pause_seconds"
  if [[ -n $stopping ]]; then exit 143; fi
done
[[ -n $deadline ]] ||
  echo "$(($(now) + $(attribute multihot-max-seconds 3600)))" >"$work/deadline"
set_limit "$(<"$work/deadline")"

echo "host $host of $resource, attempt $attempt, starts at $(date --utc +%FT%TZ)"
attribute multihot-job '' >"$work/job.json"
attribute multihot-bootstrap '' >"$work/bootstrap.py"
if ! persist call "$tpu_api/v2/$resource" >/dev/null; then
  echo "error: the account of this slice cannot use Cloud TPU, so that the slice could not delete" \
    "itself; grant it: gcloud projects add-iam-policy-binding PROJECT" \
    "--member=serviceAccount:ACCOUNT --role=roles/tpu.admin"
  exit 2
fi
endpoints="$(attribute worker-network-endpoints '')"
# Images for slices of several hosts start a runtime of another TensorFlow, which opens the chips.
if [[ $endpoints == *,* ]]; then timeout 60 systemctl stop tpu-runtime.service; fi
# Another user's would stop libtpu: /tmp is sticky, and the kernel protects such files from root too.
rm -f /tmp/libtpu_lockfile

printf '{"submission": "%s", "attempt": %d, "host": %d, "what": "%s", "line": "", "time": %d}\n' \
  "$submission" "$attempt" "$host" "installing" "$(date +%s)" >"$work/state.json"
upload "$work/state.json" "state/host-$host.json"

if [[ -n $stopping ]]; then exit 143; fi
MULTIHOT_PYTHON_URL="$(attribute multihot-python-url '')"
export MULTIHOT_PYTHON_URL
# A process group of its own, which the watchdog can kill as a whole.
setsid python3 "$work/bootstrap.py" "$work/job.json" "$work" \
  "--host=$host" "--attempt=$attempt" "--endpoints=$endpoints" &
child=$!
echo "$child" >"$work/job.pid"
wait "$child"
code=$?
# A signal to this script ends the wait, not what it waits for.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
echo "host $host ends with exit code $code at $(date --utc +%FT%TZ)"
exit "$code"
