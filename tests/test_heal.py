"""`heal` trains a saved model, saves the better one with the history of both, and refuses what cannot work before it starts."""

import functools
import shutil
from dataclasses import replace

import pytest
import torch
from invoke import Context

import tasks
from lib.compress import compress
from lib.evaluation.text import Calibration
from lib.heal import heal
from lib.models.checkpoint import read_record
from lib.models.load import load
from lib.primitives import finetune
from lib.primitives.distillation import Distillation
from lib.primitives.finetune import LoRA

MODEL, TEXT = "wiki-a-llama", Calibration("wiki-a", 12, 32)
QUICK = LoRA(rank=4, lr=3e-3, warmup=1, batch=4, evaluate_every=1, dropout=0.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An unequal model, which needs its record, and a stock one."""
    folder = tmp_path_factory.mktemp("small")
    compress(MODEL, folder / "cfsp", "cfsp", 0.4, Calibration("wiki-a", 4, 64))
    compress(MODEL, folder / "stock", "magnitude-neurons", 0.3, Calibration("wiki-a", 1, 64))
    return folder


@pytest.fixture(scope="module")
def healed(small, tmp_path_factory):
    """(kind, dense model) -> what `heal` found, and the folder with the model in `out`; each is trained once."""

    @functools.cache
    def train(kind, dense):
        folder = tmp_path_factory.mktemp("healed")
        return heal(str(small / kind), folder / "out", TEXT, QUICK, dense), folder

    return train


@pytest.mark.parametrize("kind", ["cfsp", "stock"])
@pytest.mark.parametrize("dense", ["", MODEL], ids=["next token", "dense model"])
def test_the_better_model_is_saved_in_the_form_of_the_old_one(small, healed, kind, dense):
    row, folder = healed(kind, dense)
    assert row["steps"] == 3
    assert 0 < row["step"] <= 3
    assert row["after"] < row["before"]
    before, after = load(str(small / kind))[0], load(str(folder / "out"))[0]
    assert {n: p.shape for n, p in before.named_parameters()} == {n: p.shape for n, p in after.named_parameters()}
    changed = {n.rsplit(".", 2)[-2] for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sorted(path.name for path in folder.iterdir()) == ["out"]
    if kind == "cfsp":
        old, new = (read_record(place)["provenance"] for place in (small / kind, folder / "out"))
        said = new.pop("healed")
        assert new == old
        assert (said["step"], said["dense"], said["corpus"]) == (row["step"], dense or None, "wiki-a")


def test_a_killed_run_goes_on(small, healed, tmp_path, monkeypatch):
    whole, folder = healed("cfsp", MODEL)
    seen, words = [], finetune._in_words

    def dies(row):
        if row["step"] == 3:
            raise KeyboardInterrupt
        return words(row)

    monkeypatch.setattr(finetune, "_in_words", dies)
    with pytest.raises(KeyboardInterrupt):
        heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK, MODEL)
    (state,) = (path.name for path in tmp_path.iterdir())
    assert state.startswith(".out.")
    assert state.endswith(".training")
    with pytest.raises(ValueError, match="is the state of another training into"):  # that learns from the text alone
        heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK)
    monkeypatch.setattr(finetune, "_in_words", lambda row: seen.append(row["step"]) or words(row))
    assert heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK, MODEL) == whole
    assert seen == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = list((folder / "out").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_result_that_could_not_be_saved_is_not_trained_again(small, tmp_path, monkeypatch):
    """The state of a finished training stays until its model is written."""
    with monkeypatch.context() as full:
        full.setattr("lib.heal._save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK, MODEL)
    seen, words = [], finetune._in_words
    monkeypatch.setattr(finetune, "_in_words", lambda row: seen.append(row["step"]) or words(row))
    heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK, MODEL)
    assert seen == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_work_is_refused_before_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.heal.recover", lambda *_, **__: pytest.fail("trained"))
    shutil.copytree(small / "stock", small / "other words")
    words = load(MODEL)[1]
    words.add_tokens(["<new>"])
    words.save_pretrained(small / "other words")
    with pytest.raises(ValueError, match="give the model that was compressed"):
        heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK, distillation=Distillation(0.5))
    compress(MODEL, small / "sparse", "wanda", 0.5, Calibration("wiki-a", 1, 64), pattern="2:4")
    with pytest.raises(ValueError, match="are zeros, which training would fill"):
        heal(str(small / "sparse"), tmp_path / "out", TEXT, QUICK)
    with pytest.raises(ValueError, match="too coarse to train them all: give --dtype float32"):
        heal(str(small / "cfsp"), tmp_path / "out", TEXT, replace(QUICK, rank=None))
    with pytest.raises(ValueError, match="different vocabularies"):
        heal(str(small / "cfsp"), tmp_path / "out", TEXT, QUICK, str(small / "other words"))
    with pytest.raises(FileExistsError):
        heal(str(small / "cfsp"), small / "stock", TEXT, QUICK)
    with pytest.raises(ValueError, match="positions"):
        heal(str(small / "cfsp"), tmp_path / "out", Calibration("wiki-a", 2, 100_000), QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_task_says_what_was_won(small, tmp_path, capsys):
    tasks.heal(Context(), str(small / "cfsp"), str(tmp_path / "out"), dense=MODEL, tokens=500, length=32, batch=4)
    assert f"divergence from {MODEL} on held-out text: " in capsys.readouterr().out
    assert load(str(tmp_path / "out"))[0].training is False
