"""The variables of processes as engines set them, where two hosts or more train together."""

import json


def tf_config(cluster, kind="worker", index=0):
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def cluster_spec(cluster, kind="workerpool0", index=0):
    # "trial" and "environment" are there as well, and say nothing of the hosts.
    task = {"type": kind, "index": index, "trial": "1"}
    return {"CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": task, "environment": "cloud"})}


SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
DSTACK = {"DSTACK_NODES_IPS": "fd00::1\nfd00::2", "DSTACK_NODE_RANK": "0", "DSTACK_NODES_NUM": "2"}
OWN = {"VIT_DIST_HOSTS": "a:1, b:2", "VIT_DIST_INDEX": "1"}
# An Indexed Job sets its own number; whoever wrote the manifest, the names.
JOBSET = {"VIT_DIST_HOSTS": "j-w-0-[0-1].j:1", "JOB_COMPLETION_INDEX": "1"}
SLURM = {  # the second task of the second node
    "SLURM_JOB_ID": "100",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
}
SLURM_ADDRESSES = ["gpu01:18400", "gpu01:18401", "gpu02:18400", "gpu02:18401"]


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}
