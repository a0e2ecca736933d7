"""Files run in llama.cpp in turns; what a file tells of itself is counted from its shapes."""

import pytest
import torch
from invoke import Exit

import tasks
from lib.evaluation import device
from lib.evaluation.device import file_perplexity, file_windows, run_files
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import load_corpus, spread, tokens_of
from lib.evaluation.text import windows as cut_into_windows
from lib.methods import make
from lib.models.checkpoint import export, save
from lib.models.gguf_export import to_gguf
from lib.models.load import load
from tests.conftest import tiny, token_ids
from tests.test_gguf import ROWS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dense tiny Llama, and one whose attention has lost a group of every block."""
    folder, tokenizer = tmp_path_factory.mktemp("files"), load("wiki-a-llama")[1]
    dense = tiny("llama", torch.float32, vocab_size=ROWS)
    small = make("wanda-sp-heads", dense, token_ids(), 0.5)
    saved = {"dense": export(dense, tokenizer, folder / "dense")}
    saved["small"] = (save if getattr(small, "edits", None) else export)(small, tokenizer, folder / "small")
    return [to_gguf(path, folder / f"{name}.gguf") for name, path in saved.items()]


def test_rows_are_in_order_and_counted(files):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    dense, small = run_files(files, prompt=20, generated=8, repeats=2)
    assert [dense["file"], small["file"]] == ["dense.gguf", "small.gguf"]
    assert dense["bytes"] == files[0].stat().st_size > small["bytes"]
    assert dense["kv_bytes_per_token"] == 2 * 3 * 2 * (12 + 12)  # float16, three blocks of two groups
    assert small["kv_bytes_per_token"] == dense["kv_bytes_per_token"] / 2
    for row in (dense, small):
        assert row["decode_tokens_per_s"] > 0
        assert row["first_token_ms"] > 0
        assert row["used"] >= row["bytes"]
        assert row["loaded"] > 0


def test_the_task_prints_ratios_to_the_first_file(files, capsys):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    tasks.device.body(None, [str(path) for path in files], [], threads=1, prompt=20, tokens=8)
    said = capsys.readouterr().out
    assert "dense.gguf" in said
    assert "small.gguf: 0." in said


def test_the_task_writes_files_of_folders(files, capsys):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    models = [str(files[0]), str(files[1].with_suffix(""))]
    tasks.device.body(None, models, ["float32", "Q8_0"], threads=1, prompt=20, tokens=8)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["dense.gguf", "small.float32.gguf", "small.Q8_0.gguf"]
    assert table[5].startswith("small.float32.gguf: 1.")  # 32 bits beside the 16 of the first file
    assert not list(files[0].parent.glob("small.*.gguf"))


def test_what_cannot_run_is_refused(files, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"give .gguf files"):
        run_files([tmp_path / "none.gguf"])
    text = tmp_path / "text.gguf"
    text.write_text("no model, but long enough for a header of some kind")
    with pytest.raises(ValueError, match="is no GGUF file of a model"):
        run_files([text])
    with pytest.raises(ValueError, match="has 64 positions, and prompt and text need 640"):
        run_files(files)
    with pytest.raises(Exit, match="give --model"):
        tasks.device.body(None, [], [])
    with pytest.raises(Exit, match="unknown dtype of a GGUF file 'Q3'"):
        tasks.device.body(None, ["wiki-a-llama"], ["Q3"])
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pared-down\[device\]'"):
        run_files(files)


def test_perplexity_of_a_file_is_that_of_the_model(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    dense, tokenizer = tiny("llama", torch.float32, vocab_size=ROWS), load("wiki-a-llama")[1]
    windows = token_ids(6, 24)
    expected = perplexity(dense, windows.flatten(), 24)
    plain, eight = (
        file_perplexity(to_gguf(export(dense, tokenizer, tmp_path / name), tmp_path / f"{name}.gguf", name), windows)
        for name in ("float32", "Q8_0")
    )
    assert plain.losses == pytest.approx(expected.losses, abs=23e-3)  # its keys and values have 16 bits: 0.001 a token
    assert (plain.windows, plain.tokens, plain.length) == (6, 6 * 23, 24)
    assert 1e-5 < abs(eight.perplexity / expected.perplexity - 1) < 0.02
    with pytest.raises(ValueError, match="has 64 positions"):
        file_perplexity(tmp_path / "float32.gguf", token_ids(1, 65))


def test_the_corpus_is_cut_into_the_same_windows_as_ever(files):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    tokenizer = load("wiki-a-llama")[1]
    whole = cut_into_windows(tokens_of(load_corpus("wiki-a", "test"), tokenizer), 40)
    assert file_windows(files[0], "wiki-a", 40, 5).equal(whole[spread(len(whole), 5)])
    with pytest.raises(ValueError, match="has 64 positions"):
        file_windows(files[0], "wiki-a", 65, 5)
