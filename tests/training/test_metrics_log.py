"""What a run writes down, and what is left of it when the run goes on from an earlier step."""

import json
import logging
import os

from trainer.training.metrics_log import METRICS_FILE, MetricsLog

SUMS = {
    "loss": 3.0, "loss_documents": 4.0, "documents": 4.0, "tokens": 30.0, "steps": 1.0,
    "learning_rate": 0.1, "grad_norm": 1.0, "loss_scale": 1.0, "skipped": 0.0,
}  # fmt: skip


def write(path, *lines):
    path.joinpath(METRICS_FILE).write_bytes(b"".join(lines))


def steps_of(path):
    with open(path / METRICS_FILE, encoding="utf-8") as file:
        return [json.loads(line)["step"] for line in file]


def test_a_resumed_run_keeps_the_rows_up_to_its_step_and_goes_on(tmp_path, caplog):
    write(tmp_path, *(b'{"step": %d}\n' % step for step in (1, 2, 2, 3, 4)), b'{"step": 5, "lo')
    metrics_log = MetricsLog(str(tmp_path), 3, 12, 40)
    assert steps_of(tmp_path) == [1, 2, 2, 3]
    metrics_log.log_steps(4, 16, SUMS, 40, 40)
    assert steps_of(tmp_path) == [1, 2, 2, 3, 4]
    metrics_log.flush()
    metrics_log.close()
    assert steps_of(tmp_path) == [1, 2, 2, 3, 4]
    # A killed run leaves half a row at the end; nobody has to hear of it.
    assert not caplog.records


def test_damaged_rows_are_named_and_the_others_stay(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    good = [b'{"step": %d}\n' % step for step in range(1, 6)]
    write(tmp_path, good[0], b'{"st\xff}\n', good[1], b"7\n", good[2], b'{"epoch": 1}\n', good[3])
    MetricsLog(str(tmp_path), 3, 12, 40).close()
    assert steps_of(tmp_path) == [1, 2, 3]
    path = os.path.join(str(tmp_path), METRICS_FILE)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: line {number} is damaged and left out" for number in (2, 4, 6)
    ]


def test_only_the_chief_reports(tmp_path, capfd):
    metrics_log = MetricsLog(str(tmp_path), 0, 0, 40, is_chief=False)
    metrics_log.log_steps(1, 4, SUMS, 40, 40)
    metrics_log.log_evaluation(1, 4, "validation", {"loss": 1.0})
    metrics_log.flush()
    metrics_log.close()
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
