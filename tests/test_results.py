"""The ledger resumes, files are whole, tables say what was measured."""

import json
import subprocess
import sys
import time

import pandas as pd
import pytest

from lib.evaluation.console import Progress
from lib.suite import results
from lib.suite.results import Ledger, Results, content_key, ledger_lines, markdown, write_atomically


def test_a_cell_is_computed_once_per_settings(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"perplexity": 7.5}

    ledger = Ledger(tmp_path / "l.jsonl")
    assert ledger.cell({"level": 0.1}, compute) == ledger.cell({"level": 0.1}, compute) == {"perplexity": 7.5}
    ledger.cell({"level": 0.2}, compute)
    assert len(calls) == 2
    assert Ledger(tmp_path / "l.jsonl").cell({"level": 0.1}, compute) == {"perplexity": 7.5}  # in a new process
    assert len(calls) == 2


def test_other_code_is_another_computation(tmp_path, monkeypatch):
    key = content_key({"level": 0.1})
    monkeypatch.setattr(results, "code_version", lambda modules: "other")
    assert content_key({"level": 0.1}) != key


def test_a_failing_cell_leaves_nothing_behind(tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl")
    with pytest.raises(ZeroDivisionError):
        ledger.cell({"a": 1}, lambda: 1 / 0)
    assert {"a": 1} not in Ledger(tmp_path / "l.jsonl")


def test_a_record_cut_in_the_middle_is_computed_again(tmp_path):
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    ledger.cell({"a": 1}, lambda: 1)
    ledger.cell({"a": 2}, lambda: 2)
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        again = Ledger(path)
    assert {"a": 1} in again
    assert {"a": 2} not in again
    again.cell({"a": 2}, lambda: 22)
    with pytest.warns(UserWarning, match="damaged"):
        assert Ledger(path).cell({"a": 2}, lambda: 0) == 22


KILLED = """
import os, sys
from pathlib import Path
from lib.suite.results import Results
run = Results("toy", Path(sys.argv[1]) / "toy")
for i in range(5):
    def compute(i=i):
        if i == 3 and sys.argv[2] == "die":
            os._exit(9)
        return i * i
    run.cell(compute, i=i)
run.table("squares", [{"i": i, "square": run.cell(compute, i=i)} for i in range(5)])
manifest = run.finish({})
print(manifest["cells_computed"], manifest["cells_from_ledger"])
"""


def test_a_killed_run_continues_where_it_stopped(tmp_path):
    def run(word):
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), word], capture_output=True, text=True, cwd=results.ROOT
        )

    assert run("die").returncode == 9
    assert not (tmp_path / "toy" / "tables").exists()
    assert run("live").stdout.split() == ["2", "3"]  # of five squares three were known, though all are asked for twice
    assert (tmp_path / "toy" / "tables" / "squares.csv").read_text() == "i,square\n0,0\n1,1\n2,4\n3,9\n4,16\n"


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_atomically(path, "old")
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_interactive_runs_remember_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for expected in (1, 2):  # someone edits a cell and runs it again: the new number must appear
        run = Results("toy")
        assert run.cell(lambda value=expected: value, what="number") == expected
    assert not list(tmp_path.rglob("*.jsonl"))


def test_progress_is_seldom_and_says_time_and_memory(capsys):
    progress = Progress(interval=0.0)
    progress("sliced layer 3 of 8")
    assert "sliced layer 3 of 8; 0 s since the start" in capsys.readouterr().out
    progress = Progress(interval=60.0)
    progress("sliced layer 4 of 8")
    assert capsys.readouterr().out == ""


def test_tables_and_manifest(tmp_path):
    run = Results("toy", tmp_path / "toy", "p")
    run.table("t", [{"model": "m", "ratio": 0.25, "params": 1234567, "perplexity": 12.3456789}], note="A note.")
    assert (tmp_path / "toy/tables/t.csv").read_text() == "model,ratio,params,perplexity\nm,0.25,1234567,12.3456789\n"
    assert "| m | 0.25 | 1,234,567 | 12.35 |" in (tmp_path / "toy/tables/t.md").read_text()
    manifest = run.finish({"levels": [0.25]})
    assert json.loads((tmp_path / "toy/manifest.json").read_text()) == manifest
    assert set(manifest["files"]) == {"tables/t.csv", "tables/t.md", "raw.parquet"}
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_cell_counts_once_however_many_sections_ask(tmp_path):
    """And as one of this start if it was measured in it: the manifest says what an earlier start has left."""

    def finished(*levels):
        run = Results("toy", tmp_path / "toy", "p")
        for level in levels:
            run.cell(lambda level=level: level, level=level)
        manifest = run.finish({})
        return manifest["cells_computed"], manifest["cells_from_ledger"]

    assert finished(1, 2, 1, 1) == (2, 0)
    assert finished(1, 3, 1, 3, 3) == (1, 1)


def test_the_manifest_adds_up_the_time_of_remembered_cells(tmp_path):
    def finished(*levels):
        run = Results("toy", tmp_path / "toy", "p")
        for level in levels:
            run.cell(lambda: time.sleep(0.3), level=level)
        return run.finish({})

    assert finished(1, 2)["seconds_from_ledger"] == 0
    again = finished(1, 2, 3)
    assert again["seconds_from_ledger"] == pytest.approx(0.6, abs=0.1)
    assert again["seconds"] < 0.6


def test_figures_are_reproducible_files(tmp_path):
    import matplotlib.pyplot as plt

    bytes_of = []
    for name in ("a", "b"):
        figure, axes = plt.subplots()
        axes.plot([1, 2], [3, 4], label="x")
        Results("toy", tmp_path / name).figure("f", figure)
        plt.close(figure)
        bytes_of.append([(tmp_path / name / f"figures/f.{kind}").read_bytes() for kind in ("svg", "png")])
    assert bytes_of[0] == bytes_of[1]


def test_markdown_of_gaps_and_pipes():
    import pandas as pd

    shown = markdown(pd.DataFrame([{"a": "x|y", "b": None, "c": float("nan"), "d": True, "e": 0.123456, "f": 3.0}]))
    assert shown.splitlines()[2] == "| x\\|y |  |  | True | 0.1235 | 3 |"


def test_every_measurement_is_kept(tmp_path):
    """What a run asked for is in one file, with the settings that identify it, and comes back as the ledger had it."""
    run = Results("toy", tmp_path / "toy.partial")
    for i in range(3):
        run.cell(lambda i=i: {"losses": [0.1 * i, 2.5], "note": None}, level=i / 10, nested={"a": [1, "b"]})
    manifest = run.finish({})
    raw = pd.read_parquet(tmp_path / "toy.partial" / "raw.parquet")
    assert [json.loads(text)["level"] for text in raw.settings] == [0.0, 0.1, 0.2]
    assert json.loads(raw.result[2]) == {"losses": [0.2, 2.5], "note": None}
    assert "raw.parquet" in manifest["files"]
    (tmp_path / "again.jsonl").write_text(ledger_lines(tmp_path / "toy.partial" / "raw.parquet"))
    assert Ledger(tmp_path / "again.jsonl").records == run.ledger.records
