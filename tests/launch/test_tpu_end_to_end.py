"""`submit tpu` and the startup script together: a slice is taken away, and the run resumes.

The service is a fake. Its hosts are real processes in clean folders, which run the startup script
of the slice's metadata. A slice that asks for its deletion over REST is removed from the fake.
"""

import dataclasses
import re
import threading
import time
from pathlib import Path

import fake_tpu
import pytest
from booting import BUCKET, JOB, Host, make_host
from fake_tpu import FakeTpu
from google.cloud.tpu_v2 import types

from launch import submit
from launch.cloud import tpu_slices
from launch.job import Job
from trainer import cli
from trainer.storage import gcs_client

NAME = "projects/my-project/locations/us-central1-a/queuedResources/first"
FLAGS = ["--project=my-project", "--zone=us-central1-a", f"--bucket={BUCKET}"]
FLAGS += ["--accelerator=v5e:2x2", "--name=first", "--provisioning=spot", "--follow"]


class Slices:
    """Boots a host when its slice is active, and takes the first one away."""

    def __init__(self, tpu: FakeTpu, host: Host) -> None:
        self.tpu, self.host = tpu, host
        self.folder = host.folder
        self.booted: set[str] = set()
        self.threads: list[threading.Thread] = []
        tpu.on_active = self.boot

    def boot(self, resource: types.QueuedResource) -> None:
        """Starts the host of a slice once."""
        metadata = dict(resource.tpu.node_spec[0].node.metadata)
        attempt = metadata["multihot-attempt"]
        if attempt in self.booted:
            return
        self.booted.add(attempt)
        self.host.machine.attributes = metadata
        self.host.folder = self.folder / f"disk-{attempt}"
        self.host.folder.mkdir()
        self.host.environment["MULTIHOT_WORK"] = str(self.host.work)
        self.host.start()
        do = self.take_away if attempt == "0" else self.wait_for_its_own_end
        self.threads.append(threading.Thread(target=do))
        self.threads[-1].start()

    def take_away(self) -> None:
        """Takes the machine away once it has written a checkpoint after that of step 0."""
        while "m/checkpoints/step-20.json" not in self.host.storage.buckets["data"]:
            time.sleep(0.2)
        assert self.host.process is not None
        self.host.process.terminate()
        self.host.wait()
        self.host.kill()
        with self.tpu.lock:
            self.tpu._left[NAME] = ["SUSPENDED"]
            self.tpu._set_state(NAME)

    def wait_for_its_own_end(self) -> None:
        """Removes the slice once it has asked for its deletion, as Cloud TPU does."""
        while not self.host.machine.deletes:
            time.sleep(0.2)
        self.tpu.remove(NAME)


@pytest.mark.long
def test_a_run_that_is_taken_away_resumes_on_the_next_slice(
    tmp_path: Path, corpus: str, monkeypatch, capsys
):
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.5)
    tpu = FakeTpu(states=[("PROVISIONING", "ACTIVE")])
    train = ["train", "--data_dir=gs://data/d", "--model_dir=gs://data/m", "--hidden_size=16"]
    train += ["--num_layers=1", "--num_attention_heads=2", "--intermediate_size=32"]
    train += ["--tokens_per_replica=512", "--num_train_epochs=4", "--jit_compile=false"]
    train += ["--checkpoint_every=20", "--evaluate_every=10"]
    with make_host(tmp_path, dataclasses.replace(JOB)) as host, fake_tpu.serve(tpu) as address:
        host.storage.locations[BUCKET] = "US-CENTRAL1"
        host.storage.put_folder("data", "d", corpus)
        slices = Slices(tpu, host)
        monkeypatch.setenv(tpu_slices.ENDPOINT_VARIABLE, address)
        store = host.environment["STORAGE_EMULATOR_HOST"]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store)
        gcs_client._make_client.cache_clear()
        try:
            cli.main(["submit", "tpu", *FLAGS, "--", *train])
        finally:
            gcs_client._make_client.cache_clear()
            for thread in slices.threads:
                thread.join(10)
        shown = capsys.readouterr().out
        assert "first was taken away (SUSPENDED)" in shown
        assert "first is created again (restart 1 of 3)" in shown
        (step,) = re.findall(r"resuming at step (\d+)", shown)
        (last,) = re.findall(r"trained on \d+ documents in (\d+) steps", shown)
        assert 20 <= int(step) < int(last)
        assert shown.endswith("first: done; nothing is left running\n")
        assert len(tpu.created) == 2 and tpu.resources == {}
        assert all("spot" in item.queued_resource for item in tpu.created)
        record = Job.from_json(host.storage.buckets[BUCKET]["multihot/first/job.json"].data)
        assert record.resource == NAME
