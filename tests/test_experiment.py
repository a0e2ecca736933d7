"""What a notebook measures of a model, and what it remembers of it."""

import pytest

from lib.evaluation.text import Calibration, load_corpus
from lib.methods import sweep
from lib.suite.experiment import Protocol, Subject, perplexity_rows, zero_shot_rows
from lib.suite.results import Results


@pytest.fixture
def subject(tmp_path):
    protocol = Protocol(load_corpus("wiki-a", "test"), 32, 2, ("wiki_a_continuation",), 4)
    return Subject("wiki-a-llama", protocol, Results("toy", tmp_path / "toy"))


def test_a_model_is_measured_by_size_perplexity_and_tasks(subject):
    dense = subject.dense()
    assert dense["size"]["removed_model"] == 0
    assert dense["perplexity"]["perplexity"] == subject.baseline() > 1
    assert [row["documents"] for row in dense["zero_shot"]] == [4]
    assert subject.measure(subject.model, zero_shot=False)["zero_shot"] == []


def test_a_sweep_makes_only_the_levels_that_the_ledger_lacks(subject):
    ids, made = subject.calibration(Calibration("wiki-a", 2, 32)), []

    def make(missing):
        made.extend(missing)
        return sweep("random-neurons", subject.model, ids, missing)

    subject.at_levels([0.25], make, zero_shot=False, method="random")
    found = subject.at_levels([0.5, 0.25], make, zero_shot=False, method="random")
    assert made == [0.25, 0.5]
    assert list(found) == [0.5, 0.25]
    rows = perplexity_rows(subject, "random", found)
    assert [row["ratio"] for row in rows] == [0.5, 0.25]
    assert rows[0]["removed_model"] > rows[1]["removed_model"] > 0
    assert zero_shot_rows(subject, "random", found) == []
