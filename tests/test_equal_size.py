"""Equal real size: a ratio of a method's own that removes what was wanted, told from shapes, is what the method really does."""

import contextlib
import copy

import pytest

from lib.equal_size import own_ratio
from lib.methods import METHODS, OF_BLOCKS, make
from lib.primitives.cost import count
from tests.conftest import tiny, token_ids

SETTINGS = {name: {"round_interval": 1} for name in ("slicegpt", "slicegpt-stock", "slicegpt-global")}
STOCK = ("slicegpt-stock", "slicegpt-global")  # no narrower OPT is a stock model
CASES = [
    (method, family)
    for method, record in METHODS.items()
    if record.shape
    for family in (("llama", "mistral") if method in STOCK else ("llama", "opt"))
]


def removed(small, model):
    return count(small).against(count(model))["removed_decoder"]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_shapes_tell_what_the_method_leaves(method, family):
    # Halves of attention are steps too coarse for methods that round the number of removed groups down.
    finer = {"num_key_value_heads": 4} if family == "llama" and method in ("llm-pruner", "wanda-sp-heads") else {}
    model = tiny(family, num_hidden_layers=6, **finer)
    share = own_ratio(method, model, 0.3)
    made = make(method, copy.deepcopy(model), token_ids(), share, **SETTINGS.get(method, {}))
    neuron = (3 * model.config.hidden_size + 1) / count(model).decoder
    group = 4 * 4 * model.config.hidden_size / count(model).decoder
    biases = 12 * model.config.hidden_size / count(model).decoder
    # The blocks of CFSP round on their own. FPT's and FLAP's budgets are spent to within a unit, and a bias of FLAP comes where
    # something went.
    slack = {"cfsp": 6 * neuron, "fpt": neuron, "flap": group + biases}.get(method, 1e-12)
    assert removed(made, model) == pytest.approx(removed(METHODS[method].shape(model, share), model), abs=slack)


def every_ratio(method, model):
    for i in range(512):
        with contextlib.suppress(ValueError):  # nothing would be left
            yield removed(METHODS[method].shape(model, i / 512), model)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
@pytest.mark.parametrize("method", ["svd-llm", "afr"])
def test_no_other_ratio_comes_nearer(method, family):
    kinds = {"layer_types": ["full_attention"]} if family == "gemma3_text" else {}
    model = tiny(family, num_hidden_layers=1, **kinds)
    reached = list(every_ratio(method, model))
    for wanted in (0.1, 0.25, 0.4):
        found = removed(METHODS[method].shape(model, own_ratio(method, model, wanted)), model)
        assert abs(found - wanted) == min(abs(other - wanted) for other in reached)


def test_methods_that_ask_for_that_very_share():
    model = tiny("llama")
    asked = {name for name, method in METHODS.items() if method.ratio == OF_BLOCKS}
    assert asked == {"comp", "fpt", "modegpt", "shortgpt"}
    assert {own_ratio(method, model, 0.25) for method in asked} == {0.25}


@pytest.mark.parametrize("method", ["flap", "lorap", "llm-pruner"])
def test_a_model_whose_attention_cannot_be_cut(method):
    with pytest.raises(ValueError, match="gpt_neox keeps queries, keys and values in one matrix"):
        own_ratio(method, tiny("gpt_neox"), 0.2)


def test_mistakes():
    model = tiny("llama")
    with pytest.raises(ValueError, match="'sparsegpt' depends on more than shapes: choose one of slicegpt"):
        own_ratio("sparsegpt", model, 0.2)
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 1"):
        own_ratio("afr", model, 1)
    with pytest.raises(ValueError, match=r"afr cannot remove 95% of this model's blocks: \d\d% is the nearest"):
        own_ratio("afr", model, 0.95)
