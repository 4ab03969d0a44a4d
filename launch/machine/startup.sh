#!/bin/bash
# Runs a job on a host of a Cloud TPU slice, and deletes the slice when the job has ended.
#
# This text is the startup script of every slice. The job is data in the machine's metadata, and no
# shell ever reads any part of it as code. The watchdog starts first: it deletes the slice when its
# time is over, whatever happens to the rest. A machine that is taken away (SIGTERM) deletes
# nothing, so that `submit` sees that it was taken away. If the machine starts again, so does this
# script, with the old deadline.
#
# GCE_METADATA_HOST, STORAGE_EMULATOR_HOST and MULTIHOT_TPU_URL name other servers, MULTIHOT_WORK
# another folder, MULTIHOT_CONSOLE another console and MULTIHOT_SITE_PACKAGES installed dependencies
# to use: for tests.
set -uo pipefail
umask 077

metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance"
storage="${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}"
tpu_api="${MULTIHOT_TPU_URL:-https://tpu.googleapis.com}"
work="${MULTIHOT_WORK:-/var/lib/multihot}"
console="${MULTIHOT_CONSOLE:-/dev/console}"
pause="${MULTIHOT_PAUSE:-30}"
stopping=""
child=""

# PATH below instance/
read_metadata() {
  curl --silent --fail --noproxy '*' --max-time 10 --retry 5 \
    --header 'Metadata-Flavor: Google' "$metadata/$1"
}

# NAME DEFAULT: an attribute of the machine
attribute() {
  read_metadata "attributes/$1" 2>/dev/null || printf '%s' "$2"
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

# Says on the serial console, which needs no right to any bucket, what only a person can mend.
plead() {
  local project zone name
  IFS=/ read -r _ project _ zone _ name <<<"$resource"
  printf 'multihot: this slice was refused its own deletion, and goes on billing; delete it: %s\n' \
    "gcloud compute tpus queued-resources delete $name --force --zone=$zone --project=$project" \
    2>/dev/null >>"$console"
}

# Sleeps until the deadline, and then requests the deletion again and again until this machine is
# deleted. The job ends at the deadline in any case.
watch() {
  trap '' HUP INT TERM
  # The kernel kills this process last when memory runs out.
  { echo -1000 >"/proc/$BASHPID/oom_score_adj"; } 2>/dev/null
  while (($(date +%s) < $(<"$work/deadline"))); do sleep "$((pause > 5 ? 5 : pause))"; done
  if [[ ! -e $work/ended ]]; then
    record_exit_code 124 "the time of --max_hours was over"
    kill -TERM "$$" 2>/dev/null
  fi
  until delete_slice; do
    plead
    sleep "$pause"
  done
  while sleep 60; do delete_slice; done
}

# shellcheck disable=SC2317 # A trap calls it.
finish() {
  local code=$?
  trap '' TERM
  upload "$work/startup.log" "logs/host-$host/$submission-$(printf %03d "$attempt")-startup.log"
  if [[ -n $stopping ]]; then return; fi
  touch "$work/ended"
  record_exit_code "$code" "the startup script ended"
  delete_slice
  # If that was refused, the watchdog repeats it.
  date +%s >"$work/deadline"
}

# shellcheck disable=SC2317 # A trap calls it.
stop() {
  stopping=1
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi
}

mkdir -p "$work"
# Google's agent may start this script without HOME, which installers of packages need.
export HOME="${HOME:-$work}"
cd "$work" || exit 1
exec >>"$work/startup.log" 2>&1
until resource="$(read_metadata attributes/multihot-resource)"; do sleep "$pause"; done
max_seconds="$(attribute multihot-max-seconds 3600)"
bucket="$(attribute multihot-bucket '')"
folder="$(attribute multihot-folder '')"
submission="$(attribute multihot-submission '')"
attempt="$(attribute multihot-attempt 0)"
host="$(attribute agent-worker-number 0)"
[[ -s $work/deadline ]] || echo "$(($(date +%s) + max_seconds))" >"$work/deadline"
watch </dev/null >>"$work/watchdog.log" 2>&1 &
echo $! >"$work/watchdog.pid"
trap finish EXIT
trap stop TERM

echo "host $host of $resource, attempt $attempt, starts at $(date --utc +%FT%TZ)"
rm -f "$work/exit_code.json" "$work/ended"
attribute multihot-job '' >"$work/job.json"
attribute multihot-bootstrap '' >"$work/bootstrap.py"
if ! call --retry 5 "$tpu_api/v2/$resource" >/dev/null; then
  echo "error: the account of this slice cannot use Cloud TPU, so that the slice could not delete" \
    "itself; grant it: gcloud projects add-iam-policy-binding PROJECT" \
    "--member=serviceAccount:ACCOUNT --role=roles/tpu.admin"
  exit 2
fi
endpoints="$(attribute worker-network-endpoints '')"
# Images for slices of several hosts start a runtime of another TensorFlow, which opens the chips.
if [[ $endpoints == *,* ]]; then systemctl stop tpu-runtime.service; fi
# Another user's would stop libtpu: /tmp is sticky, and the kernel protects such files from root too.
rm -f /tmp/libtpu_lockfile

printf '{"submission": "%s", "attempt": %d, "host": %d, "what": "%s", "line": "", "time": %d}\n' \
  "$submission" "$attempt" "$host" "installing" "$(date +%s)" >"$work/state.json"
upload "$work/state.json" "state/host-$host.json"

if [[ -n $stopping ]]; then exit 143; fi
python3 "$work/bootstrap.py" "$work/job.json" "$work" \
  "--host=$host" "--attempt=$attempt" "--endpoints=$endpoints" &
child=$!
wait "$child"
code=$?
# A signal to this script ends the wait, not what it waits for.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
echo "host $host ends with exit code $code at $(date --utc +%FT%TZ)"
exit "$code"
