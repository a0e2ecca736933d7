"""Models that no method here can take are refused by name, with the reason, before their weights are read.

A tiny random model of each family that the installed transformers has. A family is named when its type is in the message; the
reason is what the blocks of such a model have that no family record can say.
"""

import json

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from lib.compress import compress
from lib.evaluation.text import Calibration
from lib.models.disk import model_on_disk
from lib.models.load import load
from lib.primitives.anatomy import FAMILIES, Anatomy
from tests.conftest import COMMON, tiny

SMALL = COMMON | dict(num_hidden_layers=4, head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
)  # fmt: skip
GEMMA_4 = dict(
    vocab_size_per_layer_input=80, hidden_size_per_layer_input=8, sliding_window=8, global_head_dim=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip

# What the reason has to name.
HYBRID = "linear attention"
CONVOLUTION = "convolution"
GEMMA = "per-layer|every layer"  # a second table of embeddings feeds every layer
ROUTED = "mixture of experts|experts"
POST_NORM = "normalise"  # attention and MLP read the stream itself, and their outputs are normalised
FUSED = "fused|in one matrix"

# Model type -> settings beyond SMALL, the reason.
REFUSED = {
    "qwen3_5_text": (LINEAR, HYBRID),
    "qwen3_next": (LINEAR | EXPERTS | dict(shared_expert_intermediate_size=16), HYBRID),
    "gemma4_text": (GEMMA_4, GEMMA),
    "lfm2": (dict(layer_types=["conv", "full_attention"] * 2), CONVOLUTION),
    "mixtral": (EXPERTS, ROUTED),
    "qwen2_moe": (EXPERTS | dict(shared_expert_intermediate_size=16), ROUTED),
    "qwen3_moe": (EXPERTS, ROUTED),
    "olmoe": (EXPERTS, ROUTED),
    "gpt_oss": (EXPERTS, ROUTED),
    "granitemoe": (EXPERTS, ROUTED),
    "olmo2": ({}, POST_NORM),
    "olmo3": ({}, POST_NORM),
    "exaone4": ({}, POST_NORM),
    "phi3": ({}, FUSED),
    "glm": ({}, FUSED),
    "glm4": ({}, FUSED),
    "gpt2": ({}, FUSED),
    "bloom": ({}, FUSED),
}  # fmt: skip


def random_model(kind):
    """A tiny random model of a type, or a skip where transformers lacks it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    settings, _ = REFUSED[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings)).eval()
    assert model.config.model_type == kind
    assert sum(p.numel() for p in model.parameters()) < 3e6
    return model


def refusal(work):
    """The message with which something is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the caller looks at the message)
        work()
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_without_a_record_is_refused_by_name(kind):
    said = refusal(lambda: Anatomy(random_model(kind)))
    assert f"{kind!r} is not known here" in said
    assert all(name in said for name in FAMILIES)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_refusal_says_why(kind):
    model = random_model(kind)
    with pytest.raises(ValueError, match=f"(?s){kind}.*({REFUSED[kind][1]})"):
        Anatomy(model)


def written(model, folder):
    """The folder of a model with its configuration alone: what is refused needs no weights, and would fail on reading them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    return str(folder)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gemma4_text", "lfm2", "qwen3_moe", "olmo2", "phi3"])
def test_the_folder_of_such_a_model_is_refused_before_its_weights_are_read(tmp_path, kind):
    folder = written(random_model(kind), tmp_path / kind)
    few = Calibration("wiki-a", 4, 32)
    for work in (lambda: compress(folder, tmp_path / "out", "wanda", 0.5, few), lambda: model_on_disk(folder)):
        assert f"{kind!r} is not known here" in refusal(work)
    assert [path.name for path in tmp_path.iterdir()] == [kind]


MANY_SENSES = {  # type of the whole model -> that of its text model
    "qwen3_5": "qwen3_5_text",
    "gemma4": "gemma4_text",
}


def whole(kind, folder):
    """The folder of a model for text and images, with its configuration alone."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return written(type("Named", (), {"config": AutoConfig.for_model(kind)}), folder / kind)


@pytest.mark.parametrize("kind", MANY_SENSES)
def test_a_model_for_more_than_text_is_refused_by_name(tmp_path, kind):
    said = refusal(lambda: load(whole(kind, tmp_path)))
    assert f"{kind!r}" in said
    assert "for more than text" in said


@pytest.mark.parametrize("kind", MANY_SENSES)
def test_a_model_for_more_than_text_says_that_its_text_model_is_refused_too(tmp_path, kind):
    reason = REFUSED[MANY_SENSES[kind]][1]
    with pytest.raises(ValueError, match=f"(?s){kind}.*({reason})"):
        load(whole(kind, tmp_path))


def test_a_gemma_that_reads_in_both_directions_is_refused(tmp_path):
    """EmbeddingGemma has the type of Gemma 3."""
    model = tiny("gemma3_text", torch.float32, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="bidirectional: like EmbeddingGemma it attends to later tokens"):
        Anatomy(model)
    folder = written(model, tmp_path / "m")
    assert "bidirectional" in refusal(lambda: compress(folder, tmp_path / "out", "wanda", 0.5, Calibration("wiki-a", 4, 32)))
    assert Anatomy(tiny("gemma3_text", torch.float32)).blocks
