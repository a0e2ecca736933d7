"""What a notebook measures of a model, and what it remembers of it."""

import pytest

from lib.evaluation.generated import greedy_text
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import Calibration, load_corpus, spread, tokens_of, windows
from lib.methods import sweep
from lib.suite.experiment import Protocol, Subject, perplexity_rows, said_rows, zero_shot_rows
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


def test_a_second_text_is_read_where_all_windows_are(tmp_path):
    """On as many windows, by itself; a model that reads fewer windows of the first text does not read the second."""
    text, second = load_corpus("wiki-a", "test"), load_corpus("wiki-a", "validation")
    subject = Subject("wiki-a-llama", Protocol(text, 32, 4, fewer=2, second=second), Results("toy", tmp_path / "toy"))
    whole = windows(tokens_of(second, subject.tokenizer), 32)
    alone = perplexity(subject.model, whole[spread(len(whole), 4)].flatten(), 32)
    assert subject.dense()["second"]["losses"] == pytest.approx(list(alone.losses))
    assert "second" not in subject.measure(subject.model, zero_shot=False)
    assert subject.second_columns(subject.measure(subject.model, zero_shot=False))["wiki-a_perplexity"] is None

    small = next(sweep("random-neurons", subject.model, subject.calibration(Calibration("wiki-a", 2, 32)), [0.5]))[1]
    found = subject.measure(small, zero_shot=False, full=True)
    ours = perplexity(small, whole[spread(len(whole), 4)].flatten(), 32)
    columns = subject.second_columns(found)
    assert columns["wiki-a_perplexity"] == pytest.approx(ours.perplexity)
    assert columns["wiki-a_times_dense"] == pytest.approx(ours.perplexity / alone.perplexity)
    assert columns["wiki-a_low"] < columns["wiki-a_times_dense"] < columns["wiki-a_high"]


def test_without_a_second_text_no_table_has_its_columns(subject):
    assert subject.second_columns(subject.dense()) == {}


def test_divergence_is_measured_on_all_windows(tmp_path):
    protocol = Protocol(load_corpus("wiki-a", "test"), 32, 4, fewer=2)
    subject = Subject("wiki-a-llama", protocol, Results("toy", tmp_path / "toy"))
    found = subject.measure(subject.model, zero_shot=False, apart=True)
    assert found["perplexity"]["windows"] == 4
    assert found["perplexity"]["losses"] == pytest.approx(subject.dense()["perplexity"]["losses"])
    assert (found["kl"], found["same_top"]) == (pytest.approx(0, abs=1e-6), 1)


def test_what_faces_no_task_does_not_depend_on_the_tasks(tmp_path):
    """More questions, asked of some models, leave the measurements of the others valid; other tokens leave none."""
    text = load_corpus("wiki-a", "test")
    few, more = (
        Subject("wiki-a-llama", Protocol(text, 32, 2, ("wiki_a_continuation",), limit), Results("toy", tmp_path))
        for limit in (4, 8)
    )
    assert few.record(tasks=False) == more.record(tasks=False)
    assert few.record() != more.record()
    few.tokens = few.tokens.flip(0)
    assert few.record(tasks=False) != more.record(tasks=False)


def test_what_single_levels_depend_on_is_in_their_own_keys(subject):
    ids, made = subject.calibration(Calibration("wiki-a", 2, 32)), []

    def make(missing):
        made.extend(missing)
        return sweep("random-neurons", subject.model, ids, missing)

    for each in ({0.25: {"own": 1}, 0.5: {"own": 2}}, {0.25: {"own": 1}, 0.5: {"own": 3}}):
        subject.at_levels([0.25, 0.5], make, zero_shot=False, quiet=True, each=each, method="random")
    assert made == [0.25, 0.5, 0.5]


def test_the_prompt_is_continued_where_all_windows_are_read(tmp_path):
    protocol = Protocol(load_corpus("wiki-a", "test"), 32, 4, fewer=2, prompt="The city lies on the river")
    subject = Subject("wiki-a-llama", protocol, Results("toy", tmp_path / "toy"))
    cells = {0.0: subject.dense(), 0.5: subject.measure(subject.model, zero_shot=False)}
    [row] = said_rows(subject, {"dense": cells})
    assert (row["method"], row["ratio"], row["times_dense"]) == ("dense", 0.0, pytest.approx(1))
    assert row["says"] == " ".join(greedy_text(subject.model, subject.tokenizer, protocol.prompt).split())
