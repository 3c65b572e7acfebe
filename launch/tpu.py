"""Cloud TPU VMs: a shell script that asks for a queued resource and runs a job on it."""

import dataclasses
import os
import re
import shlex

from launch.job import (
    COORDINATOR_PORT,
    Call,
    Job,
    LaunchError,
    exports,
    limited,
    process_flags,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where a TPU is asked for, and what it is made ready with.

    Attributes:
        project: Google Cloud project.
        zone: Zone, as in "us-central2-b".
        runtime_version: Software of the VM, as in "v2-alpha-tpuv5-lite".
        setup: Shell command, run once on each machine before the job.
        spot: "yes" for cheaper machines that may be taken away.
    """

    project: str
    zone: str
    runtime_version: str
    setup: str = (
        "make .venv/installed && .venv/bin/pip install -c constraints.txt 'jax[tpu]'"
    )
    spot: str = "no"


def render(job: Job, options: Options) -> Call:
    """Return the call of bash with the script.

    Raises:
        LaunchError: The job does not fit.
    """
    job.refuse("tpu", processes_per_host=1, kind=("tpu",))
    if not job.model:
        raise LaunchError(
            "accelerator='tpu': a type is missing, as in tpu:v5litepod-16"
        )
    workers = _workers(job.model)
    if workers not in (None, job.hosts):
        raise LaunchError(
            f"hosts={job.hosts}: {job.accelerator} has {workers} workers; use "
            f"--hosts={workers}"
        )
    if job.devices_per_process > 1:
        raise LaunchError(
            f"devices_per_process={job.devices_per_process}: the type of a TPU says it"
        )
    if options.spot not in ("yes", "no"):
        raise LaunchError(f"spot={options.spot!r} must be 'yes' or 'no'")
    remote = _remote(job)
    settings = {
        "name": job.name,
        "project": options.project,
        "zone": options.zone,
        "type": job.model,
        "version": options.runtime_version,
        "source": os.path.abspath(job.directory),
        "setup": f"mkdir -p {job.name} && tar -xzf {job.name}.tgz -C {job.name} && "
        f"cd {job.name} && {options.setup}",
        "command": remote,
    }
    lines = "".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items())
    spot = " --spot" if options.spot == "yes" else ""
    text = f"#!/usr/bin/env bash\n{lines}{_BODY.replace('@SPOT@', spot)}"
    return Call(f"{job.name}.sh", text, ("bash",), tool="gcloud")


def _workers(model: str) -> int | None:
    """Return how many machines a type of TPU has; None for a type not known here."""
    found = re.fullmatch(r"(v2|v3|v4|v5p|v5litepod|v6e)-(\d+)", model)
    if found is None:
        return None
    size = int(found[2])
    if found[1] in (
        "v5litepod",
        "v6e",
    ):  # counted in chips: 8 of one machine, or 4 of each
        return 1 if size <= 8 else size // 4
    return max(1, size // 8)  # counted in cores


# What was committed is copied: not .venv, caches and runs. The machines are given back only
# when the job has succeeded and its runs are here: what they hold (checkpoints, ledger)
# exists nowhere else.
_BODY = """\
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

"${queued[@]}" create "$name" --node-id="$name" --accelerator-type="$type" \\
  --runtime-version="$version"@SPOT@ "${where[@]}"
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
"""


def _remote(job: Job) -> str:
    """Return what each machine runs; it asks the cloud for its number and for the first."""
    flags = process_flags(
        job,
        # "HOST,HOST" or "NAME:ID:ADDRESS,...", in the order of the workers.
        coordinator=f"${{first##*:}}:{COORDINATOR_PORT}",
        process_id="$(attribute agent-worker-number)",
    )
    words = " ".join([shlex.join(job.command), *(f'"{flag}"' for flag in flags)])
    # Copies that do not know of each other would write into one workdir each, for nothing.
    find = _ATTRIBUTES.replace("@HOSTS@", str(job.hosts)) + (_FIRST if flags else "")
    return f"cd {job.name} || exit\n{exports(job.variables)}{find}{limited(job, words)}"


_ATTRIBUTES = """\
attribute() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
workers=$(attribute worker-network-endpoints)
commas=${workers//[^,]/}
if (( ${#commas} + 1 != @HOSTS@ )); then
  echo "error: hosts=@HOSTS@, and this TPU has $(( ${#commas} + 1 )) workers" >&2
  exit 2
fi
"""
_FIRST = "first=${workers%%,*}\n"
