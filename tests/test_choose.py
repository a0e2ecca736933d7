"""`invoke choose`: which methods are tried, how they fall out, and what is said of those that are not tried."""

import functools
import re

import pytest
from invoke import Context, Exit

import tasks
from lib.budgets import Budget, fitting_ratio
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import load_corpus, spread, tokens_of, windows
from lib.methods import METHODS, NOTHING, make
from lib.models.gguf_export import FileSize, to_gguf
from lib.models.load import ASSETS, load
from lib.primitives.cost import count
from lib.primitives.structured import remove_blocks
from lib.suite import choose as choosing
from lib.suite.choose import LLAMA_CPP, SUITE, TRANSFORMERS, Clock, Judge, Trials, candidates, check_runs, choose, outcome
from lib.suite.standing import BEHIND
from tests.conftest import tiny

BUDGET = Budget("share", 0.9)
FOLDER = str(ASSETS / "wiki-a-llama")


@pytest.fixture(scope="module")
def llama():
    return load("wiki-a-llama")


@pytest.fixture(scope="module")
def shallow(llama):
    """Three of its blocks: the ratios of all methods are found in less time."""
    return remove_blocks(llama[0], range(3, 8)), llama[1]


@pytest.fixture
def few(monkeypatch):
    """Little text, and methods that take no time."""
    monkeypatch.setattr(choosing, "ROUNDS", ((2, 2), (4, 4), (8, 8)))
    monkeypatch.setattr(choosing, "LENGTH", 64)
    quick = ("magnitude-neurons", "random-neurons", "wanda-sp", "cfsp", "shortgpt", "svd", "fpt", "wanda")
    monkeypatch.setattr(choosing, "METHODS", {name: METHODS[name] for name in quick})


@functools.cache
def fitted(name, network, budget, size, settings):
    """`fitting_ratio`, searched once for a method and a budget: all tests ask for the same model."""
    return fitting_ratio(name, network, budget, size, settings)


@functools.cache
def measure_of(network, budget):
    return budget.size_of(network, FOLDER, "model")


def all_candidates(llama, where, budget=BUDGET):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choosing, "fitting_ratio", fitted)
        return candidates(llama[0], budget, measure_of(llama[0], budget), check_runs(where, FOLDER))


def test_what_needs_least_is_tried_first_and_every_method_is_accounted_for(shallow):
    found, untried = all_candidates(shallow, SUITE)
    needs = [METHODS[candidate.method].needs for candidate in found]
    assert needs == sorted(needs, key=choosing.CHEAP_FIRST.index)
    assert needs[0] == NOTHING
    assert {candidate.method for candidate in found} | set(untried) == set(METHODS)
    assert set(untried) == {"sparsegpt", "wanda"}  # and FPT is a candidate
    for name in untried:
        assert "zeros are stored like other numbers" in untried[name]


def test_where_it_must_run_leaves_methods_out(shallow):
    suite, stock, gguf = (
        {candidate.method for candidate in all_candidates(shallow, where)[0]} for where in (SUITE, TRANSFORMERS, LLAMA_CPP)
    )
    assert suite >= {"svd-llm", "slicegpt", "comp"}
    assert gguf >= {"comp", "cfsp", "shortgpt"}
    assert stock >= {"afr", "shortgpt"}
    assert not {"svd-llm", "slicegpt"} & (gguf | stock)
    untried = all_candidates(shallow, LLAMA_CPP)[1]
    assert "merge-to-dense" in untried["svd-llm"]
    assert "slicegpt-stock" in untried["slicegpt"]


def test_the_bytes_of_a_file_leave_out_what_no_file_holds(shallow):
    """With the reason that the export gives."""
    most = 0.9 * FileSize(FOLDER, "model", "Q4_0")(shallow[0])
    found, untried = all_candidates(shallow, LLAMA_CPP, Budget("bytes", most, "Q4_0"))
    assert {candidate.method for candidate in found} | set(untried) == set(METHODS)
    assert {"cfsp", "comp", "modegpt", "fpt", "slicegpt-stock"} <= {candidate.method for candidate in found}
    assert "merge-to-dense" in untried["svd"]
    assert "slicegpt-stock" in untried["slicegpt"]


def test_every_candidate_keeps_to_the_budget():
    network = tiny("llama", intermediate_size=96, num_hidden_layers=4)
    budget = Budget("bytes", 0.8 * count(network).bytes)
    measure = budget.size_of(network, FOLDER, "model")
    found, untried = candidates(network, budget, measure, check_runs(SUITE, FOLDER))
    assert set(untried) == {"sparsegpt", "wanda"}
    for candidate in found:
        method = METHODS[candidate.method]
        assert measure(method.shape(network, candidate.ratio, method.settings())) <= budget.most


def run(llama, minutes, said=None, where=SUITE):
    judge = Judge(*llama, "wiki-a", 64, 0)
    field, untried = all_candidates(llama, where)
    measure = BUDGET.size_of(llama[0], FOLDER, "model")
    report = said.append if said is not None else lambda line: None
    check, clock = check_runs(where, FOLDER), Clock(60 * minutes)
    return *Trials(judge, BUDGET, measure, check, clock, report, untried).halve(field), untried


def test_the_better_half_goes_on_and_the_numbers_are_those_of_the_models(llama, few):
    ranking, dropped, untried = run(llama, 10)
    assert {row["method"] for row in ranking + dropped} == set(choosing.METHODS) - {"wanda"}
    assert set(untried) == {"wanda"}
    for rows in (ranking, *([row for row in dropped if row["samples"] == n] for n in (2, 4))):
        assert [row["relative"] for row in rows] == sorted(row["relative"] for row in rows)
    assert len([row for row in dropped if row["samples"] == 2]) <= 3  # of seven, four go on
    best = ranking[0]
    judge = Judge(*llama, "wiki-a", 64, 0)
    small = make(best["method"], llama[0], judge.calibration(best["samples"]), best["ratio"])
    held_out = windows(tokens_of(load_corpus("wiki-a", "validation"), llama[1]), 64)
    chosen = held_out[spread(len(held_out), best["windows"])].flatten()
    found, dense = (perplexity(model, chosen, 64) for model in (small, llama[0]))
    assert best["relative"] == pytest.approx(found.perplexity / dense.perplexity, rel=1e-6)
    assert best["budget"] <= 0.9
    assert outcome({"ranking": ranking}).startswith(f"{best['method']}: perplexity {best['relative']:.3f} times dense [")


def test_it_ends_when_all_others_are_behind(llama, few, monkeypatch):
    def standings(dense, cells, **_):
        row = {"low": 1, "high": 2}
        return [row | {"method": m, "relative": 1 + i, "standing": BEHIND if i else "first"} for i, m in enumerate(cells)]

    monkeypatch.setattr(choosing, "standings", standings)
    ranking, dropped, _ = run(llama, 10)
    assert not dropped
    assert {row["samples"] for row in ranking} == {2}
    assert outcome({"ranking": ranking}).endswith("no other is level with it")


def test_time_is_kept_and_what_it_leaves_out_is_said(llama, few, monkeypatch):
    ticks = iter(range(0, 100_000, 20))  # every look at the clock takes twenty seconds
    monkeypatch.setattr(choosing.time, "monotonic", lambda: next(ticks))
    said = []
    ranking, dropped, untried = run(llama, 5, said)
    left_out = [method for method, reason in untried.items() if "no time was left" in reason]
    assert left_out
    assert {row["method"] for row in ranking + dropped} | set(untried) == set(choosing.METHODS)
    assert any(line.startswith("no time for") for line in said)


def test_without_any_time_it_says_so(llama, few):
    with pytest.raises(ValueError, match="give more --minutes"):
        run(llama, -1)


def test_bytes_are_those_of_the_saved_file(tmp_path, few, monkeypatch):
    """The embedded models are saved in bfloat16, and tried in float32."""
    monkeypatch.setattr(choosing, "METHODS", {name: METHODS[name] for name in ("magnitude-neurons", "wanda-sp")})
    most = 0.8 * sum(path.stat().st_size for path in ASSETS.glob("wiki-a-llama/*.safetensors"))
    found = choose("wiki-a-llama", Budget("bytes", most), tmp_path / "small", minutes=10, report=lambda line: None)
    written = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert 0.9 * most < found["ranking"][0]["budget"] <= most
    assert written == pytest.approx(found["ranking"][0]["budget"], rel=0.02)


def test_what_turns_out_not_to_run_there_is_left_out(llama, few, monkeypatch):
    """The shape that is counted has blocks of equal width, and what a method makes need not."""
    judge, measure = Judge(*llama, "wiki-a", 64, 0), BUDGET.size_of(llama[0], FOLDER, "model")
    field, untried = all_candidates(llama, LLAMA_CPP)

    def refuse(model):
        if len({block.mlp.up_proj.out_features for block in model.model.layers}) > 1:
            raise ValueError("its blocks are of unequal widths")

    ranking, dropped = Trials(judge, BUDGET, measure, refuse, Clock(600), lambda line: None, untried).halve(field)
    assert untried["cfsp"] == "its blocks are of unequal widths"
    assert "cfsp" not in {row["method"] for row in ranking + dropped}
    assert ranking


def trials(llama, budget, measure, untried):
    return Trials(Judge(*llama, "wiki-a", 128, 0), budget, measure, lambda model: None, Clock(600), lambda line: None, untried)


def test_what_is_made_larger_than_was_counted_is_made_again(llama, monkeypatch):
    """Where blocks differ, more rows are filled up to multiples of 32: at the counted ratios by 1 % too much."""
    monkeypatch.setattr(choosing, "ROUNDS", ((4, 2),))
    monkeypatch.setattr(choosing, "METHODS", {name: METHODS[name] for name in ("cfsp", "modegpt", "wanda-sp")})
    budget = Budget("bytes", 1.3e6, "Q4_0")
    measure = budget.size_of(llama[0], FOLDER, "model")
    field, untried = all_candidates(llama, LLAMA_CPP, budget)
    counted = {candidate.method: candidate.ratio for candidate in field}
    ranking, _ = trials(llama, budget, measure, untried).halve(field)
    assert {row["method"] for row in ranking} == set(choosing.METHODS)
    assert all(1.25e6 < row["budget"] <= 1.3e6 for row in ranking)
    assert [row["method"] for row in ranking if row["ratio"] == counted[row["method"]]] == ["wanda-sp"]
    ids = Judge(*llama, "wiki-a", 128, 0).calibration(4)
    for row in ranking:
        assert measure(make(row["method"], llama[0], ids, row["ratio"])) == row["budget"]
        assert row["method"] == "wanda-sp" or measure(make(row["method"], llama[0], ids, counted[row["method"]])) > 1.3e6


def test_what_stays_larger_than_the_budget_is_left_out_with_the_reason(llama, few):
    plain = BUDGET.size_of(llama[0], FOLDER, "model")

    def measure(model):  # blocks that differ cost more than there is to remove
        return plain(model) + (len({block.mlp.up_proj.out_features for block in model.model.layers}) > 1)

    field, untried = all_candidates(llama, SUITE)
    ranking, dropped = trials(llama, BUDGET, measure, untried).halve(field)
    said = r"its blocks differ, and even at a ratio of 0\.\d\d it is \d\d+\.\d\d% over 90\.0% of the parameters"
    assert re.fullmatch(said, untried["cfsp"])
    assert "cfsp" not in {row["method"] for row in ranking + dropped}
    with pytest.raises(ValueError, match="no method could be tried:\n.*cfsp: its blocks differ"):
        trials(llama, BUDGET, measure, {}).halve([candidate for candidate in field if candidate.method == "cfsp"])


def test_what_is_saved_keeps_to_the_budget(tmp_path, few, monkeypatch):
    """Trials compute in float32, and the model that is saved is computed in its own precision."""
    monkeypatch.setattr(choosing, "METHODS", {"cfsp": METHODS["cfsp"]})
    said = []
    budget = Budget("bytes", 1.3e6, "Q4_0")
    found = choose("wiki-a-llama", budget, tmp_path / "small", LLAMA_CPP, minutes=10, report=said.append)
    assert found["winner"] == "cfsp"
    assert to_gguf(tmp_path / "small", tmp_path / "small.gguf", "Q4_0").stat().st_size <= 1.3e6
    assert "ask for a little less" not in "".join(said)
    monkeypatch.setattr(choosing, "compress", lambda *_, **__: {"budget": 1.4e6})
    choose("wiki-a-llama", budget, tmp_path / "other", LLAMA_CPP, minutes=10, report=said.append)
    assert said[-1].endswith("is 7.69% over 1.3 MB in Q4_0: ask for a little less")


def test_a_text_too_short_to_judge_by(tmp_path, few):
    (tmp_path / "short.txt").write_text("\n\n".join(f"A paragraph of a few words, number {i}." for i in range(70)))
    with pytest.raises(ValueError, match="less than two windows of 64 tokens: give more text"):
        choose("wiki-a-llama", BUDGET, tmp_path / "small", corpus=str(tmp_path / "short.txt"))


def test_a_budget_that_nothing_keeps_to(tmp_path, few):
    with pytest.raises(ValueError, match="no method keeps to 1,000 parameters and runs in llama.cpp") as error:
        choose("wiki-a-llama", Budget("params", 1000), tmp_path / "small", LLAMA_CPP)
    assert "cfsp leaves at least" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_winner_is_saved_from_the_command_line(tmp_path, few, capsys, monkeypatch):
    out, results = tmp_path / "small", []
    monkeypatch.setattr(choosing, "choose", lambda *args, **more: results.append(choose(*args, **more)) or results[-1])
    tasks.choose(Context(), model="wiki-a-llama", out=str(out), target_share="90%", minutes=10.0)
    said = capsys.readouterr().out
    *_, last = said.splitlines()
    ranked = [line.split()[0] for line in said.splitlines() if "times dense" in line and " windows" in line and line != last]
    assert last.startswith(f"{ranked[0]}: perplexity ")
    assert results[0]["winner"] == results[0]["ranking"][0]["method"] == ranked[0]
    assert sum(p.numel() for p in load(str(out))[0].parameters()) <= 0.9 * sum(
        p.numel() for p in load("wiki-a-llama")[0].parameters()
    )
    assert [line.split()[0] for line in said.splitlines() if "not tried" in line] == ["wanda"]
    with pytest.raises(tasks.Exit, match="give --target-bytes, --target-params or --target-share"):
        tasks.choose(Context(), model="wiki-a-llama", out=str(tmp_path / "other"))
    with pytest.raises(FileExistsError, match="exists"):
        choose("wiki-a-llama", BUDGET, out)


@pytest.mark.parametrize(
    ("where", "file", "counted"), [("llama.cpp", "", "float16"), ("llama.cpp", "Q4_0", "Q4_0"), ("this suite", "", "")]
)
def test_bytes_for_llama_cpp_are_those_of_the_file_that_runs_there(monkeypatch, where, file, counted):
    def stop(model, budget, *_):
        raise ValueError(f"counted in {budget.file!r}")

    monkeypatch.setattr("lib.suite.choose.choose", stop)
    with pytest.raises(Exit, match=f"counted in '{counted}'"):
        tasks.choose.body(None, "wiki-a-llama", "out", target_bytes="1MB", file=file, for_=where)
