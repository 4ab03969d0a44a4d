"""TF_CONFIG and Slurm's variables as a cluster, and every mistake in them as one clear line."""

import json
import socket

import pytest

from trainer.errors import UserError
from trainer.runtime.cluster import read_cluster

SLURM = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[9-10],gpu-b[01-02]-ib",
    "SLURM_STEP_TASKS_PER_NODE": "2,1(x3)",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_ID": "1001",
}


def tf_config(task, **jobs):
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_tf_config_as_vertex_ai_writes_it():
    """Keys of Vertex AI's own, the chief apart, an evaluator that is no worker."""
    environment = {
        "TF_CONFIG": json.dumps(
            {
                "cluster": {
                    "chief": ["training-workerpool0-ab-0:2222"],
                    "worker": ["training-workerpool1-ab-0:2222", "training-workerpool1-ab-1:2222"],
                    "evaluator": ["training-workerpool3-ab-0:2222"],
                },
                "environment": "cloud",
                "job": '{"python_module": ""}',
                "task": {"type": "worker", "index": "1", "trial": "1", "cloud": "ab"},
            }
        )
    }
    cluster = read_cluster(environment)
    assert cluster.num_workers == 3 and cluster.index == 2 and cluster.source == "TF_CONFIG"
    assert cluster.name(0) == "chief (training-workerpool0-ab-0:2222)"
    assert cluster.name(2) == "worker 2 (training-workerpool1-ab-1:2222)"


@pytest.mark.parametrize("text", ["", "  ", "{}", '{"environment": "cloud"}'])
def test_no_cluster_is_none(text):
    assert read_cluster({"TF_CONFIG": text}) is None
    assert read_cluster({"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TF_CONFIG": "{worker"}, "TF_CONFIG: is not JSON"),
        ({"TF_CONFIG": "[]"}, "TF_CONFIG=[]: expected"),
        (tf_config(None, worker=["a:1"]), "task is None"),
        (tf_config({"type": "worker", "index": 2}, worker=["a:1", "b:1"]), "has 2 of them"),
        (tf_config({"type": "worker", "index": -1}, worker=["a:1"]), "number -1"),
        (tf_config({"type": "worker", "index": "x"}, worker=["a:1"]), "number 'x'"),
        (tf_config({"type": "chief", "index": 0}, worker=["a:1"]), "'chief' number 0"),
        (tf_config({"type": "worker", "index": 0}, worker=["a"]), "expected a list of HOST:PORT"),
        (tf_config({"type": "worker", "index": 0}, worker="a:1"), "expected a list of HOST:PORT"),
        (tf_config({"type": "worker", "index": 0}, worker=["a:1", "a:1"]), "an address twice"),
        (tf_config({"type": "worker", "index": 0}, worker=["a:1"], ps=["b:1"]), "names ps tasks"),
        (tf_config({"type": "evaluator", "index": 0}, worker=["a:1"]), "is an evaluator"),
    ],
)
def test_a_mistake_in_tf_config_is_named(environment, said):
    with pytest.raises(UserError, match="TF_CONFIG") as caught:
        read_cluster(environment)
    assert said in str(caught.value)


def test_slurm_gives_addresses_in_order_of_rank():
    """Nodes in Slurm's own order: by name, n10 would come before n9 and take its rank."""
    cluster = read_cluster(SLURM)
    first = 12_000 + 1001 * 16 % 20_000
    assert cluster.addresses == (
        f"n9:{first}",
        f"n9:{first + 1}",
        f"n10:{first}",
        f"gpu-b01-ib:{first}",
        f"gpu-b02-ib:{first}",
    )
    assert cluster.index == 2 and cluster.source == "Slurm"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SLURM_NODEID": "0"}, "--distribution=block"),
        ({"SLURM_PROCID": "7"}, "--distribution=block"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}, "names 4 nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE=two"),
        ({"SLURM_STEP_NODELIST": "n[9-"}, "SLURM_STEP_NODELIST=n[9-"),
    ],
)
def test_a_slurm_step_that_cannot_be_used_is_named(change, said):
    with pytest.raises(UserError) as caught:
        read_cluster(SLURM | change)
    assert said in str(caught.value)


def test_slurm_outside_of_srun_is_named():
    environment = {name: value for name, value in SLURM.items() if name != "SLURM_NODEID"}
    with pytest.raises(UserError, match="SLURM_NODEID not set; start the workers with srun"):
        read_cluster(environment)


def test_tf_config_wins_over_slurm():
    environment = SLURM | tf_config({"type": "worker", "index": 0}, worker=["a:1", "b:1"])
    assert read_cluster(environment).addresses == ("a:1", "b:1")


def test_who_does_not_answer_is_found():
    gone = free_port()
    with socket.create_server(("127.0.0.1", 0)) as there:
        addresses = [f"127.0.0.1:{there.getsockname()[1]}", f"127.0.0.1:{gone}", "nowhere.test:1"]
        cluster = read_cluster(tf_config({"type": "worker", "index": 0}, worker=["me:1"]))
        cluster = type(cluster)(("me:1", *addresses), 0, "TF_CONFIG")
        assert cluster.find_missing() == [
            f"worker 2 (127.0.0.1:{gone})",
            "worker 3 (nowhere.test:1)",
        ]
