#!/usr/bin/env bash
name=digits
project=my-project
zone=us-central2-b
type=v5litepod-16
version=v2-alpha-tpuv5-lite
source=/home/me/dpjax
setup='mkdir -p digits && tar -xzf digits.tgz -C digits && cd digits && make .venv/installed && .venv/bin/pip install -c constraints.txt '"'"'jax[tpu]'"'"''
command='cd digits || exit
attribute() {
  curl --silent --fail --header '"'"'Metadata-Flavor: Google'"'"' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
workers=$(attribute worker-network-endpoints)
commas=${workers//[^,]/}
if (( ${#commas} + 1 != 4 )); then
  echo "error: hosts=4, and this TPU has $(( ${#commas} + 1 )) workers" >&2
  exit 2
fi
first=${workers%%,*}
timeout --foreground --preserve-status --signal=TERM --kill-after=90 600m python -m experiments.train --config=configs/digits_mlp_dpsgd.py --workdir=runs/digits "--coordinator_address=${first##*:}:8476" "--num_processes=4" "--process_id=$(attribute agent-worker-number)"'
set -euo pipefail
changes=$(git -C "$source" status --porcelain)
if [[ -n "$changes" ]]; then
  echo "error: $source has changes that are not committed, and would not be copied:" >&2
  echo "$changes" >&2
  exit 2
fi
where=(--project="$project" --zone="$zone" --quiet)
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

"${queued[@]}" create "$name" --node-id="$name" --accelerator-type="$type" \
  --runtime-version="$version" --spot "${where[@]}"
echo "to give it back: ${queued[*]} delete $name --force ${where[*]}"
while true; do
  state=$("${queued[@]}" describe "$name" --format='value(state.state)' "${where[@]}")
  echo "$name: $state"
  case "$state" in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done
folder=$(mktemp -d)
git -C "$source" archive --format=tar.gz --output="$folder/$name.tgz" HEAD
"${vm[@]}" scp --worker=all "$folder/$name.tgz" "$name:" "${where[@]}"
rm -r "$folder"
"${vm[@]}" ssh "$name" --worker=all --command="$setup" "${where[@]}"
"${vm[@]}" ssh "$name" --worker=all --command="$command" "${where[@]}"
"${vm[@]}" scp --recurse --worker=0 "$name:$name/runs" "$source" "${where[@]}"
"${queued[@]}" delete "$name" --force "${where[@]}"
