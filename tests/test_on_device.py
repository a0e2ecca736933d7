"""The question prune or quantise: files in llama.cpp against torch, and sentences against rows made by hand."""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lib.evaluation.perplexity import perplexity
from lib.methods import make
from lib.models.load import load
from lib.suite import on_device, plots
from lib.suite.on_device import File, answer, device_rows, front, headline
from tests.conftest import tiny, token_ids
from tests.test_gguf import ROWS


def measured_row(method, size, kind, megabytes, nats, speed=1.0, cache=100):
    """A row of `measured`: three windows of eleven tokens, each `nats` a token above the dense model's 1, 2 and 3."""
    losses = tuple(10 * (level + nats) for level in (1.0, 2.0, 3.0))
    record = {"perplexity": math.exp(2 + nats), "losses": losses, "length": 11, "windows": 3, "tokens": 30}
    row = {"method": method, "size": size, "kind": kind, "bytes": int(1e6 * megabytes), "perplexity": record, "used": 5e6}
    row |= {"writes": speed, "reads": 2 * speed, "expected": 200 / megabytes, "decode_tokens_per_s": 50 * speed}
    return row | {"first_token_ms": 10.0, "kv_bytes_per_token": cache}


DENSE = [measured_row("dense", 0.0, "F16", 200, 0.0), measured_row("dense", 0.0, "Q8_0", 106, 0.01, 1.8)]
DENSE += [measured_row("dense", 0.0, "Q4_0", 60, 0.1, 2.0)]


def comp(four_bits=50.0, sixteen_bits=160.0, nats=0.3):
    found = [measured_row("COMP", 0.2, "F16", sixteen_bits, nats, 1.2, 80)]
    return [DENSE[0], *found, measured_row("COMP", 0.2, "Q4_0", four_bits, nats + 0.1, 4.0)]


def test_rows_hold_ratios_and_the_dense_file_once():
    rows = device_rows("m", [DENSE, comp()])
    assert [(row["method"], row["kind"]) for row in rows] == [
        ("dense", "F16"), ("dense", "Q8_0"), ("dense", "Q4_0"), ("COMP", "F16"), ("COMP", "Q4_0"),
    ]  # fmt: skip
    assert [row["times_dense"] for row in rows] == pytest.approx([1, math.exp(0.01), math.exp(0.1), math.exp(0.3), math.exp(0.4)])
    assert [row["mb"] for row in rows] == [200, 106, 60, 160, 50]
    assert all(row["low"] <= row["times_dense"] + 1e-9 and row["high"] >= row["times_dense"] - 1e-9 for row in rows)


def test_the_front_and_its_sentences():
    rows = device_rows("m", [DENSE, comp()])
    assert [row["mb"] for row in front(rows)] == [200, 106, 60, 50]  # COMP in 16 bits is larger and worse than dense in eight
    lines = answer(rows)
    assert headline(rows) == "m: four bits alone are the better deal down to 60.0 MB, 30% of 16 bits"
    assert lines[0] == f"{headline(rows)}."
    assert lines[1].endswith("dense, Q4_0 (60 MB, 1.11 times dense); COMP 20%, Q4_0 (50 MB, 1.49 times dense).")
    assert lines[2] == "COMP 20%, F16: 0.80 of the cache, reads 2.40 and writes 1.20 times as fast as dense (bytes: 1.25)."
    # By their bytes they could have 1.25 times the speed of dense in F16, and 1.2 times that of dense in Q4_0, which is 2.4.
    assert lines[3].endswith("Slower than 0.9 of that: none.")
    assert len(lines) == 4  # no two files are alike


def test_speed_is_held_against_the_dense_file_of_the_same_kind():
    slow = [DENSE[0], measured_row("COMP", 0.2, "F16", 160, 0.3, 1.1), measured_row("COMP", 0.2, "Q4_0", 50, 0.4, 2.2)]
    twin = [DENSE[0], measured_row("CFSP", 0.2, "F16", 160, 0.3, 1.32)]
    *_, reached, apart = answer(device_rows("m", [DENSE, slow, twin]))
    assert reached.endswith("Slower than 0.9 of that: COMP 20%, F16.")  # 1.1 of 1.25; 2.2 of 2.4 is near enough
    assert apart.startswith("Files of the same shape write up to 1.20 times as fast as each other here")


def test_a_pruned_file_can_win():
    better = device_rows("m", [DENSE, comp(four_bits=60.0, nats=-0.05)])
    assert [row["mb"] for row in front(better)] == [160, 106, 60]  # dense in eight bits is smaller than the first
    assert headline(better).endswith("the best of their size: COMP 20%, F16; COMP 20%, Q4_0")


def test_the_figure_shows_what_the_rows_say():
    rows = device_rows("m", [DENSE, comp()])
    figure = plots.device_figure(pd.DataFrame(rows), headline(rows))
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}
    assert list(drawn) == ["dense, 16 to 4 bits", "COMP, F16", "COMP, Q4_0"]
    assert drawn["dense, 16 to 4 bits"].get_xdata().tolist() == [200, 106, 60]
    assert drawn["COMP, F16"].get_markerfacecolor() == "white" != drawn["COMP, Q4_0"].get_markerfacecolor()
    assert drawn["COMP, Q4_0"].get_color() == plots.COLOURS["deletes neurons"]
    assert "60.0 MB" in figure.get_suptitle().replace("\n", " ")
    plt.close(figure)


def test_files_in_llama_cpp_say_what_torch_says():
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    dense, tokenizer = tiny("llama", torch.float32, vocab_size=ROWS), load("wiki-a-llama")[1]
    windows = token_ids(3, 24)
    small = make("cfsp", dense, token_ids(), 0.5)
    files = [File("dense", 0.0, "F16", dense), File("CFSP", 0.5, "F16", small), File("CFSP", 0.5, "Q4_0", small)]
    rows = on_device.measured(files, tokenizer, windows)
    assert rows[0]["writes"] == rows[0]["reads"] == rows[0]["expected"] == 1.0
    assert rows[0]["bytes"] > rows[1]["bytes"] > rows[2]["bytes"]
    assert rows[2]["expected"] == rows[0]["bytes"] / rows[2]["bytes"]
    for row, model in zip(rows[:2], (dense, small), strict=True):
        assert row["perplexity"]["losses"] == pytest.approx(perplexity(model, windows.flatten(), 24).losses, abs=0.1)
    gaps = [abs(row["perplexity"]["perplexity"] / rows[1]["perplexity"]["perplexity"] - 1) for row in rows[1:]]
    assert 1e-4 < gaps[1] < 0.1


def test_what_llama_cpp_cannot_run_is_named(capsys, monkeypatch):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    subjects = [SimpleNamespace(name=family, model=tiny(family)) for family in ("opt", "llama")]
    assert [subject.name for subject in on_device.runnable(subjects)] == ["llama"]
    assert "opt: not in llama.cpp here, because model type 'opt' has no GGUF export" in capsys.readouterr().out
    monkeypatch.setattr("lib.evaluation.device.importlib.util.find_spec", lambda _: None)
    assert on_device.runnable(subjects) == []
    assert "pip install 'pared-down[device]'" in capsys.readouterr().out
