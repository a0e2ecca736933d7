"""The check of a machine says what is missing and what to do, and its comparison of the model would notice a wrong one."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from invoke import Exit
from packaging.requirements import Requirement

import tasks
from lib.evaluation.text import load_corpus, tokens_of, windows
from lib.models.load import load
from lib.suite import ready, ready_models
from lib.suite.results import RAW as NAME
from lib.suite.results import RESULTS, ROOT

RAW = RESULTS / "workshop" / "slicegpt" / NAME
PROJECT = """[project]
requires-python = ">=3.11"
dependencies = ["numpy>=1", "torch>=999", "no-such-package-of-ours>=2"]
optional-dependencies = {device = ["no-such-package-either>=1"]}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "results").mkdir()
    return tmp_path


def test_this_installation_is_complete_but_for_what_is_optional():
    checks = ready.machine(ROOT)
    assert [check.name for check in checks if not check.ready and not check.optional] == []
    assert all(check.line.startswith(("ready ", "optional ")) for check in checks)


def test_what_is_missing_or_too_old_is_named_with_the_remedy(project):
    checks = {check.name: check for check in ready.machine(project)}
    line = checks["packages"].line
    assert line.startswith(f"NOT READY  packages: torch is {torch.__version__}, not >=999; no-such-package-of-ours is missing")
    assert line.endswith("Do: pip install -e ., in the folder of this project")
    assert "numpy" not in line
    rest = checks["llama.cpp, for exported files"].line
    assert rest == "optional   llama.cpp, for exported files: no-such-package-either is missing. Do: pip install -e '.[device]'"


def test_python_is_compared_as_versions(project):
    assert ready.python(project, "3.11.0").ready
    assert ready.python(project, "3.100.1").ready
    old = ready.python(project, "3.9.20")
    assert not old.ready
    assert "install Python >=3.11" in old.line


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    assert ready.writable(tmp_path).ready
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        assert ready.writable(tmp_path / name).line.startswith("NOT READY  results: ")


def test_unfit_reads_ranges():
    version = Requirement("numpy").name and ready.importlib.metadata.version("numpy")
    assert ready.unfit(Requirement(f"numpy=={version}")) == ""
    assert ready.unfit(Requirement("numpy<1")) == f"numpy is {version}, not <1"


def test_the_expected_perplexity_is_that_of_the_same_windows():
    """Against a computation that shares nothing with the command but the model and the text."""
    length, expected = ready_models.measured_before(RAW)
    model, tokenizer = load(ready_models.MODEL)
    ids = windows(tokens_of(load_corpus("wiki-a", "test"), tokenizer), length)[: ready_models.WINDOWS]
    with torch.no_grad():
        scores = model(ids).logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])
    assert expected == pytest.approx(math.exp(-scores.mean().item()), rel=1e-5)
    check = ready_models.embedded(RAW)
    assert check.ready
    assert f"perplexity {expected:.2f} on {ready_models.WINDOWS} windows" in check.found


def test_another_model_is_not_taken_for_the_embedded_one(monkeypatch):
    model, tokenizer = load(ready_models.MODEL)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    monkeypatch.setattr(ready_models, "load", lambda _: (model, tokenizer))
    check = ready_models.embedded(RAW)
    assert not check.ready
    assert "requirements.lock" in check.line


def test_without_a_committed_run_there_is_nothing_to_compare_with(tmp_path):
    path = tmp_path / "results" / NAME
    path.parent.mkdir()
    assert "git checkout" in ready_models.embedded(path).line
    path.write_text("no parquet")
    assert not ready_models.embedded(path).ready
    pd.DataFrame({"settings": [json.dumps({"model": "another"})], "result": ["{}"]}).to_parquet(path)
    assert not ready_models.embedded(path).ready


def test_the_real_model_is_optional(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(ready_models, "cached", lambda _, there=there: there)
        check = ready_models.real()
        assert (check.ready, check.optional) == (there, True)
    assert check.line.endswith("Do: invoke fetch --model smollm2-135m")


def test_the_command_ends_with_a_verdict(project, monkeypatch, capsys):
    shutil.copy(ROOT / "pyproject.toml", project)
    fine = [ready.Check("model", True, "as expected"), ready.Check("extra", False, "not there", "this", optional=True)]
    monkeypatch.setattr(ready_models, "models", lambda results: fine)
    tasks.ready.body(None)
    said = capsys.readouterr().out
    assert said.endswith("ready      model: as expected\noptional   extra: not there. Do: this\nthis machine is ready\n")
    monkeypatch.setattr(ready_models, "models", lambda results: [ready.Check("model", False, "wrong", "that")])
    with pytest.raises(Exit, match="not ready yet: model"):
        tasks.ready.body(None)
    (project / "pyproject.toml").write_text(PROJECT)
    monkeypatch.setattr(tasks, "ROOT", project)
    monkeypatch.setattr(ready_models, "models", lambda results: pytest.fail("models are not tried without their packages"))
    with pytest.raises(Exit, match="not ready yet: packages"):
        tasks.ready.body(None)
