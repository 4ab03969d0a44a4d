"""Inputs that change while a command reads them are told, and nothing is made of them."""

import os
from pathlib import Path

import pytest
from preparing import ROWS, config, write_rows

from trainer import prepare, score
from trainer.config import ScoreConfig
from trainer.errors import UserError
from trainer.sources.listing import FileVersions


def test_versions_tell_which_file_changed(tmp_path, cloud):
    here, there = str(tmp_path / "a.jsonl"), "gs://b/b.jsonl"
    Path(here).write_text("1")
    cloud.put("b", "b.jsonl", b"1")
    names = [f"jsonl:{here}", there, "tfds:some/set:train"]
    versions = FileVersions(names)
    versions.check()
    cloud.put("b", "b.jsonl", b"1")
    versions.check(names[:1])
    with pytest.raises(UserError, match="^gs://b/b.jsonl: changed while it was read"):
        versions.check()
    os.utime(here, ns=(0, 0))
    with pytest.raises(UserError, match=f"^{here}: changed while it was read"):
        versions.check(names[:1])
    os.remove(here)
    with pytest.raises(UserError, match="changed while it was read"):
        versions.check(names[:1])


@pytest.mark.parametrize("change", ["fewer", "more", "others"])
def test_score_counts_no_part_of_an_input_that_changed(
    model, documents, tmp_path, monkeypatch, change
):
    source = tmp_path / "few.jsonl"
    lines = Path(documents).read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    source.write_text("".join(lines))
    save_plan = score.save_plan

    def save_and_change(folder, plan):
        assert save_plan(folder, plan)
        more = '{"text": "a"}\n' * (source.stat().st_size // 14)
        content = {"fewer": "".join(lines[:25]), "more": more, "others": "".join(lines[::-1])}
        source.write_text(content[change])
        return True

    monkeypatch.setattr(score, "save_plan", save_and_change)
    settings = {"rows_per_part": 10, "max_rejected": 100}
    output = tmp_path / "out"
    with pytest.raises(UserError, match="few.jsonl: changed while it was read"):
        score.run(
            ScoreConfig(model=model, input=(str(source),), output_dir=str(output), **settings)
        )
    assert not list(output.glob("part-*")) and not (output / "_SUCCESS").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="few.jsonl: changed since"):
        score.run(
            ScoreConfig(model=model, input=(str(source),), output_dir=str(output), **settings)
        )


def test_prepare_makes_nothing_of_an_input_that_changed(tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    write_corpus = prepare.write_corpus

    def change_and_write(*arguments):
        write_rows(rows, ROWS[::-1])
        return write_corpus(*arguments)

    monkeypatch.setattr(prepare, "write_corpus", change_and_write)
    with pytest.raises(UserError, match="rows.jsonl: changed while it was read"):
        prepare.run(config(rows, tmp_path / "data", split="all"))
    assert not (tmp_path / "data").exists()
