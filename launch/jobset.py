"""Kubernetes: a JobSet (jobset.x-k8s.io), one pod for each process."""

import dataclasses
from typing import Any

import yaml

from launch.job import (
    COORDINATOR_PORT,
    GRACE_SECONDS,
    Call,
    Job,
    LaunchError,
    process_flags,
)

_WORKER = "worker"
_RESOURCES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How Kubernetes runs a job.

    Attributes:
        image: Container image that holds the repository and its environment.
        volume_claim: Persistent volume claim, mounted at ``runs`` in the job's directory:
            a pod that is started again goes on from the checkpoints, so they must outlive
            it. Every pod mounts it.
        namespace: Where the job lives, None for kubectl's own choice.
        node_selector: Labels of the nodes wanted, as in "KEY=VALUE,KEY=VALUE"; they say
            which model of an accelerator.
        max_restarts: How often the job is started again after a pod was stopped or lost.
    """

    image: str
    volume_claim: str
    namespace: str | None = None
    node_selector: str = ""
    max_restarts: int = 10


def render(job: Job, options: Options) -> Call:
    """Return the call of kubectl.

    Raises:
        LaunchError: The job does not fit.
    """
    job.refuse("jobset", model=("",))
    for name in ("image", "volume_claim"):
        if not getattr(options, name):
            raise LaunchError(f"{name}='' is empty; see --help")
    if options.max_restarts < 0:
        raise LaunchError(f"max_restarts={options.max_restarts} must be at least 0")
    if not job.directory.startswith("/"):
        raise LaunchError(f"directory={job.directory!r} must be absolute in the image")
    metadata = {"name": job.name, "namespace": options.namespace}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {k: v for k, v in metadata.items() if v is not None},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {
                        "name": "end",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": _WORKER,
                    "replicas": 1,
                    "template": {"spec": _job_spec(job, options)},
                }
            ],
        },
    }
    text = yaml.safe_dump(jobset, sort_keys=False, width=1000)
    # apply would say "unchanged", and run nothing, for a job that has been run before.
    argv = ("kubectl", "create", "--filename")
    return Call(f"{job.name}.yaml", text, argv, tool="kubectl")


def _job_spec(job: Job, options: Options) -> dict[str, Any]:
    limit = {} if job.minutes is None else {"activeDeadlineSeconds": 60 * job.minutes}
    return {
        "completionMode": "Indexed",
        "parallelism": job.processes,
        "completions": job.processes,
        # Processes cannot be replaced one at a time: any that is lost ends this round, and
        # the JobSet starts all of them again.
        "backoffLimit": 0,
        **limit,
        "podFailurePolicy": {
            "rules": [
                {
                    # experiments.train: wrong config or input. 1 may mean a lost peer.
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": _WORKER,
                        "operator": "In",
                        "values": [2],
                    },
                }
            ]
        },
        "template": {"spec": _pod_spec(job, options)},
    }


def _pod_spec(job: Job, options: Options) -> dict[str, Any]:
    # The name that JobSet gives the pod with index 0 of its job with index 0.
    host = f"{job.name}-{_WORKER}-0-0.{job.name}"
    flags = process_flags(
        job,
        coordinator=f"{host}:{COORDINATOR_PORT}",
        process_id="$(JOB_COMPLETION_INDEX)",
    )
    container: dict[str, Any] = {
        "name": _WORKER,
        "image": options.image,
        "workingDir": job.directory,
        # Kubernetes expands $(NAME), and reads $$ as $.
        "command": [*(word.replace("$", "$$") for word in job.command), *flags],
        "env": [
            {"name": k, "value": v.replace("$", "$$")} for k, v in job.variables.items()
        ],
        "volumeMounts": [
            {"name": "runs", "mountPath": f"{job.directory.rstrip('/')}/runs"}
        ],
    }
    if job.kind in _RESOURCES:
        # A string: quantities may be written so, and the generated types of Kubernetes
        # know no other way.
        amount = str(job.devices_per_process)
        container["resources"] = {"limits": {_RESOURCES[job.kind]: amount}}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [
            {
                "name": "runs",
                "persistentVolumeClaim": {"claimName": options.volume_claim},
            }
        ],
    }
    if options.node_selector:
        pod["nodeSelector"] = _labels(options.node_selector)
    return pod


def _labels(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key and value for key, _, value in pairs):
        raise LaunchError(f"node_selector={text!r} must be as in KEY=VALUE,KEY=VALUE")
    return {key: value for key, _, value in pairs}
