"""No work is lost at its end: what a method leaves can be saved and read again, or it is refused before the work begins."""

import contextlib
import itertools
import re
import warnings

import pytest
import torch
import transformers

from lib.compress import check_finished
from lib.methods import METHODS, make, settings_of
from lib.models.checkpoint import CheckpointError, export, load_checkpoint, save
from lib.models.folder import empty_model
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count
from lib.primitives.structured import ffn_widths, kv_groups, remove_groups, remove_neurons
from lib.suite.architectures import ARCHITECTURES
from tests.conftest import CONFIGS, relative, tiny, token_ids

# --- published shapes -------------------------------------------------------------------------------------------------

LLAMA_2_7B = ARCHITECTURES["Llama-2-7B"]
SHAPES = {
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-2-13B": LLAMA_2_7B
    | dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=40),
    "Llama-3.2-3B": LLAMA_2_7B
    | dict(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=True,
    ),
    "TinyLlama": LLAMA_2_7B | dict(hidden_size=2048, intermediate_size=5632, num_key_value_heads=4),
}  # fmt: skip
LEVELS = (0.1, 0.2, 0.25, 0.3, 0.5)
# A few blocks: no check depends on how many there are, but COMP drops whole ones.
MODELS = {
    name: empty_model(transformers.AutoConfig.for_model(**shape | dict(num_hidden_layers=8))) for name, shape in SHAPES.items()
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_results_of_published_shapes_can_be_saved(tmp_path, method, name):
    for ratio in LEVELS:
        check_finished(METHODS[method], settings_of(method, {}), MODELS[name], ratio, tmp_path / "out")


@pytest.mark.parametrize("name", SHAPES)
def test_stock_widths_are_near_and_accepted(name):
    """What a user asks for, rounded down by less than one head on each; the class of the result reads it."""
    model = MODELS[name]
    heads, d = model.config.num_attention_heads, model.config.hidden_size
    for ratio in LEVELS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # counting shapes warns of nothing
            small = METHODS["slicegpt-stock"].shape(model, ratio, settings_of("slicegpt-stock", {}))
        k = small.config.hidden_size
        assert k % 8 == k % heads == 0
        assert (1 - ratio) * d - 8 * heads < k <= (1 - ratio) * d
        assert transformers.LlamaConfig(**small.config.to_dict()).hidden_size == k


def test_a_changed_width_is_told():
    model = tiny("llama", torch.float32, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8)
    with pytest.warns(UserWarning, match="a stock LlamaConfig accepts no width of 32: 24 of 48 directions are kept"):
        small = make("slicegpt-stock", model, token_ids(), 0.3)
    assert small.config.hidden_size == 24
    with pytest.raises(ValueError, match="accepts no multiple of 20 up to 20 as the width of a stock model: use a lower ratio"):
        make("slicegpt-stock", model, token_ids(), 0.5, round_interval=20)


@pytest.mark.parametrize("method", ["slicegpt-stock", "slicegpt-global"])
@pytest.mark.parametrize(
    ("family", "reason"),
    [("opt", "not a stock model"), ("phi", "not a stock model"), ("qwen3", "epsilon of the norms"), ("gemma3_text", "sandwich")],
)
def test_families_without_a_stock_form_are_refused_before_the_work(monkeypatch, method, family, reason):
    monkeypatch.setattr("lib.papers.slicegpt.ResidualStream", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(ValueError, match=reason):
        make(method, tiny(family, torch.float32), token_ids(), 0.25)


# --- odd shapes -------------------------------------------------------------------------------------------------------

ODD = {
    "heads that do not divide the width": dict(hidden_size=30, num_attention_heads=4, num_key_value_heads=2, head_dim=6),
    "one head": dict(num_attention_heads=1, num_key_value_heads=1),
    "one key for five heads": dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=1, head_dim=8),
    "one neuron": dict(intermediate_size=1),
    "one block": dict(num_hidden_layers=1),
    "odd numbers": dict(hidden_size=45, intermediate_size=37, num_attention_heads=3, num_key_value_heads=3, head_dim=10),
}
OPT = {"hidden_size": ("hidden_size", "word_embed_proj_dim"), "intermediate_size": ("ffn_dim",)}


def odd_model(family, shape):
    """A tiny model of an odd shape, or None where the family's own class refuses it."""
    settings = dict(ODD[shape])
    if family in ("opt", "phi", "gpt_neox"):
        settings.pop("head_dim", None)
    if family in ("opt", "gpt_neox"):
        settings.pop("num_key_value_heads", None)
    if family == "opt":
        settings = {name: value for key, value in settings.items() for name in OPT.get(key, (key,))}
    if family == "gemma3_text" and "num_hidden_layers" in settings:
        settings["layer_types"] = ["full_attention"]
    with contextlib.suppress(Exception):  # such as a width that is no multiple of the heads
        model = tiny(family, torch.float32, **settings)
        model(token_ids(1, 4))  # an OPT of such a width can be built, but not run
        return model
    return None


REFUSED = (
    "leaves none|leaves no rank|leaves no neuron|heads cannot be cut|neurons beyond|cannot rotate|is not a stock model"
    "|has to change; save it|mask tuning needs|accepts no multiple"
)
# Every method meets every family in two of the odd shapes, and every family every shape.
CASES = [
    (method, family, shape)
    for (i, method), (j, family) in itertools.product(enumerate(METHODS), enumerate(CONFIGS))
    for shape in (list(ODD)[(i + j) % len(ODD)], list(ODD)[(i + 2 * j + 3) % len(ODD)])
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "family", "shape"), CASES)
def test_what_is_made_reads_back_as_it_was(tmp_path, method, family, shape):
    model = odd_model(family, shape)
    if model is None:
        pytest.skip(f"{family} cannot have {shape}")
    ids = token_ids(8, 24)
    try:
        small = make(method, model, ids, 0.3)
    except ValueError as refusal:  # of this shape or family; any other error is a fault
        if not re.search(REFUSED, str(refusal)):
            raise
        pytest.skip(str(refusal))
    stock = not hasattr(small, "edits")
    folder = (export if stock else save)(small, None, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval() if stock else load_checkpoint(folder)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt", "phi"])
def test_heads_that_no_longer_divide_the_width(tmp_path, family):
    """Five of six heads in every block: a stock model where its class accepts that, else a record of edits; both read back."""
    sizes = dict(hidden_size=48, num_attention_heads=6) | (dict(word_embed_proj_dim=48) if family == "opt" else {})
    sizes |= {} if family == "opt" else dict(num_key_value_heads=6)
    dense = tiny(family, torch.float32, **sizes)
    five = remove_groups(dense, [torch.arange(5)] * 3)
    uneven = remove_neurons(five, [torch.arange(30 + i) for i in range(3)])
    for name, small in (("five", five), ("uneven", uneven)):
        stock = not hasattr(small, "edits")
        assert stock == (name == "five" and family in ("mistral", "qwen2", "qwen3", "phi"))
        folder = (export if stock else save)(small, None, tmp_path / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval() if stock else load_checkpoint(folder)
        assert kv_groups(again) == [5, 5, 5]
        assert ffn_widths(again) == ffn_widths(small)
        with torch.no_grad():
            assert relative(again(token_ids()).logits, small(token_ids()).logits) == 0


# --- the check itself -------------------------------------------------------------------------------------------------


def test_a_model_that_could_not_be_read_is_not_written(tmp_path):
    """Configuration or edits that do not describe the model: an error at once, and no folder."""
    refused = tiny("llama")
    refused.config.num_attention_heads = 5
    with pytest.raises(CheckpointError, match="cannot be saved, because LlamaConfig refuses its shape"):
        export(refused, None, tmp_path / "out")
    narrower = remove_neurons(tiny("llama"), [torch.arange(40)] * 3)
    narrower.config.intermediate_size = 41
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight is .*40.* but would be read as .*41"):
        export(narrower, None, tmp_path / "out")
    uneven = remove_neurons(tiny("llama"), [torch.arange(40 + i) for i in range(3)])
    uneven.edits[0]["neurons"] = [40, 41, 43]
    with pytest.raises(CheckpointError, match="cannot be saved: .* is .*42"):
        save(uneven, None, tmp_path / "out")
    extra = tiny("opt")
    Anatomy(extra).blocks[0].fc1.register_parameter("more", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(CheckpointError, match="disagree on tensors: missing .*more"):
        export(extra, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_check_counts_what_the_method_leaves(tmp_path):
    """The bytes for which there must be room are those of the finished model, not of the dense one."""
    model = MODELS["TinyLlama"]
    small = METHODS["cfsp"].shape(model, 0.5, None)
    assert count(small).bytes < 0.8 * count(model).bytes
