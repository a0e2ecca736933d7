"""The table of where each result can go is true, as far as that can be tried here, of a tiny Llama for every method."""

import copy
import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from lib.methods import METHODS, changes, make
from lib.models.checkpoint import export, save
from lib.models.gguf_export import kinds, to_gguf
from lib.models.load import load
from lib.primitives.anatomy import FAMILIES
from lib.primitives.low_rank import merge_to_dense
from lib.suite import destinations
from lib.suite.destinations import LLAMA_CPP, PLACES, QUANTISED, SOURCE, SUITE, TESTED, TORCH_EXPORT, TRANSFORMERS, VLLM, cells
from tests.conftest import tiny, token_ids
from tests.test_gguf import ROWS, Runtime, header

SHAPE = dict(vocab_size=ROWS, hidden_size=64, intermediate_size=128, num_hidden_layers=4, head_dim=16)


@functools.cache
def result(name, **settings):
    """What a method leaves of a tiny Llama whose rows are multiples of 32."""
    ratio = {"sparsegpt": 0.5, "wanda": 0.5, "lorap": 0.45}.get(name, 0.3)
    return make(name, tiny("llama", torch.float32, **SHAPE), token_ids(), ratio, **settings)


def saved(model, folder):
    tokenizer = load("wiki-a-llama")[1]
    return (save if changes(model) else export)(model, tokenizer, folder)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def assert_equal(one, two, tolerance=0.0):
    ids = token_ids(2, 12, seed=5)
    assert (logits(one, ids) - logits(two, ids)).abs().max() <= tolerance


def answers(name, place):
    """The answer for a method at a place, the model that the method leaves, and the one behind what the answer advises."""
    said, model = cells(METHODS[name])[place], result(name)
    if "merge-to-dense" in said:
        return said, model, merge_to_dense(copy.deepcopy(model))
    advised = re.search(r"`--set (\w+)=(\w+)`", said)
    return said, model, result(name, **{advised[1]: int(advised[2]) if advised[2].isdigit() else advised[2]}) if advised else None


@pytest.mark.parametrize("name", METHODS)
def test_plain_transformers(tmp_path, name):
    said, model, advised = answers(name, TRANSFORMERS)
    if said.startswith("no, because"):
        with pytest.raises(ValueError, match="not a stock model"):
            export(model, None, tmp_path / "no")
        with pytest.raises(OSError, match=r"model\.safetensors"):  # what this suite saves holds nothing that it would load
            transformers.AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "no"))
        assert said.endswith(TESTED) == (advised is not None)
        model = advised
    else:
        assert said == TESTED
    if model is not None:
        folder = export(model, None, tmp_path / "yes")
        assert_equal(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), model)


@pytest.mark.parametrize("name", METHODS)
def test_llama_cpp(tmp_path, name):
    said, model, advised = answers(name, LLAMA_CPP)
    if said.startswith("no, because"):
        with pytest.raises(ValueError, match=r"merge-to-dense|slicegpt-stock"):
            to_gguf(saved(model, tmp_path / "no"), tmp_path / "no.gguf")
        assert said.endswith(TESTED) == (advised is not None)
        model = advised
    else:
        assert said.startswith(TESTED)
    if model is not None:
        path, ids = to_gguf(saved(model, tmp_path / "yes"), tmp_path / "yes.gguf", "float32"), token_ids(1)
        assert (header(path)["general.architecture"] == "deci") == ("as `deci`" in said)
        expected = logits(model, ids)[0].log_softmax(-1)
        assert (Runtime(path).log_probabilities(ids[0].tolist(), ROWS) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_llama_cpp_quantised(tmp_path, name):
    """Eight bits for all matrices."""
    said, model, advised = answers(name, QUANTISED)
    if said.startswith("no, because"):
        with pytest.raises(ValueError, match=r"merge-to-dense|slicegpt-stock"):
            to_gguf(saved(model, tmp_path / "no"), tmp_path / "no.gguf", "Q8_0")
    model = advised or (None if said.startswith("no, because") else model)
    if model is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, ids = to_gguf(saved(model, tmp_path / "yes"), tmp_path / "yes.gguf", "Q8_0"), token_ids(1)
    assert set(kinds(path).type) == {"F32", "Q8_0"}
    expected = logits(model, ids)[0].softmax(-1)
    assert (Runtime(path).log_probabilities(ids[0].tolist(), ROWS).exp() - expected).abs().max() < 0.02


class Logits(torch.nn.Module):
    """A model as a function of tokens alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", METHODS)
def test_torch_export(name):
    """The graph, which holds the widths and factors as they are, gives the logits of the model for other tokens."""
    said, model, _ = answers(name, TORCH_EXPORT)
    assert said == TESTED
    with torch.no_grad():
        graph = torch.export.export(Logits(model), (token_ids(2, 12),)).module()
        ids = token_ids(2, 12, seed=5)
        torch.testing.assert_close(graph(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_this_suite(tmp_path, name):
    said, model, _ = answers(name, SUITE)
    assert said == TESTED
    assert_equal(load(str(saved(model, tmp_path / "m")))[0], model)


def test_every_answer_is_of_one_of_three_kinds():
    for method in METHODS.values():
        found = cells(method)
        assert set(found) == set(PLACES)
        for place, said in found.items():
            assert re.match(f"{TESTED}|{SOURCE}|no, because ", said), (method.name, place)
        assert found[VLLM].startswith(SOURCE) == (found[TRANSFORMERS] == TESTED)  # both have classes for stock models alone
        assert TESTED not in found[VLLM]


def test_vllm_is_not_said_to_lack_widths_of_each_block():
    """Its DeciLMForCausalLM has them."""
    assert "vLLM" not in destinations.ONE_WIDTH
    for method in METHODS.values():
        said = cells(method)[VLLM]
        assert "one width" not in said
        assert ("DeciLMForCausalLM" in said) == (destinations.leaves(method) == destinations.UNEQUAL)


def test_the_tables_name_every_method_and_family_once():
    rows = destinations.table().splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted(METHODS)
    for row in rows:
        for name in re.findall(r"`([\w-]+)`", row.split(" | ")[0]):
            assert row.strip("| ").split(" | ")[1:] == [cells(METHODS[name])[place] for place in PLACES]
    assert [row.split(" | ")[0] for row in destinations.families().splitlines()[2:]] == [f"| {family}" for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_cpp_calls_the_families(tmp_path, family):
    """The architectures in the table are those of exported files, of blocks of equal and of unequal widths."""
    row = next(row for row in destinations.families().splitlines() if row.startswith(f"| {family} |"))
    for said, method in zip(row.strip("| ").split(" | ")[1:], ("wanda-sp", "cfsp"), strict=True):
        tied = "head is the table" in said
        model = make(method, tiny(family, vocab_size=ROWS, tie_word_embeddings=tied), token_ids(), 0.3)
        out = Path(tmp_path / method)
        if said.startswith("no, because"):
            with pytest.raises(ValueError, match="no GGUF"):
                to_gguf(saved(model, out), out.with_suffix(".gguf"))
        else:
            found = header(to_gguf(saved(model, out), out.with_suffix(".gguf")))["general.architecture"]
            assert f"`{found}`" in said
