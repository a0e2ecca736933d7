"""Families that are no Llama to llama.cpp: a file of theirs, dense or pruned, is the model, or it is refused with a way out."""

import re
import warnings

import pytest
import torch
from torch import nn

from lib.methods import METHODS, changes, make
from lib.models.checkpoint import export, save
from lib.models.gguf_architecture import ARCHITECTURES, MODEL_TYPES
from lib.models.gguf_export import DTYPES, FileSize, kinds, to_gguf
from lib.models.load import load
from lib.primitives.anatomy import FAMILIES, Anatomy
from lib.primitives.structured import remove_blocks, remove_groups, remove_neurons
from tests.conftest import relative, tiny, token_ids
from tests.test_gguf import LLAMA3, ROWS, STRUCTURED, Runtime, header, matrices

WINDOWS = {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"], "num_hidden_layers": 7}


class SixteenBitGelu(nn.Module):
    """GELU as llama.cpp has it on CPUs: by the formula with tanh, in a table of 16-bit numbers, between -10 and 10."""

    def forward(self, x):
        inside = nn.functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x.abs() < 10, inside, x.clamp(min=0))


def made(family, **settings):
    """A tiny model. MLPs with GELU add a quarter, so that 16-bit numbers rounded the other way stay below all tolerances."""
    model = tiny(family, vocab_size=ROWS, **settings)
    if family != "qwen3":
        mlp, offset = FAMILIES[family].mlp, FAMILIES[family].gain_offset
        for block in Anatomy(model).blocks:  # of a Gemma 3 the norm behind the MLP decides how much it adds
            weight = block.get_submodule(mlp.output_norm or mlp.writer).weight.data
            weight.add_(offset).div_(4).sub_(offset)
    return model


def as_llama_cpp(model):
    """The model with the activation of llama.cpp; the given one is changed."""
    for name, _ in list(model.named_modules()):
        if name.endswith(("mlp.act_fn", "mlp.act", "mlp.activation_fn")) and model.config.model_type != "qwen3":
            model.set_submodule(name, SixteenBitGelu())
    return model


def written(model, folder, dtype="float32"):
    tokenizer = load("wiki-a-llama")[1]
    return to_gguf((save if getattr(model, "edits", None) else export)(model, tokenizer, folder / "m"), folder / "m.gguf", dtype)


def assert_same(model, path, cached=False):
    """llama.cpp finds the model's log-probabilities behind every beginning of a text, and continues it with the same tokens."""
    model, ids = as_llama_cpp(model), token_ids(1, 14)
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = model(ids).logits[0].float().log_softmax(-1)
    found = Runtime(path).log_probabilities(ids[0].tolist(), ROWS, cached)
    assert (found - expected).abs().max() < 1e-3  # NaN, a token that was not listed, fails as well
    assert found[13:-1].argmax(-1).tolist() == ids[0, 14:].tolist()


# --- dense models --------------------------------------------------------------------------------------------------------

TWO_ROTATIONS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
CASES = {
    "qwen3": ("qwen3", lambda: made("qwen3")),
    "qwen3, tied": ("qwen3", lambda: made("qwen3", tie_word_embeddings=True)),
    "qwen3, stretched evenly": (
        "qwen3",
        lambda: made("qwen3", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}),
    ),
    "phi": ("phi2", lambda: made("phi")),
    "phi, tied": ("phi2", lambda: made("phi", tie_word_embeddings=True)),
    "phi, fewer keys": ("phi2", lambda: made("phi", num_key_value_heads=1)),
    "gpt_neox": ("gptneox", lambda: made("gpt_neox", hidden_act="gelu_new")),
    "gpt_neox, tied": ("gptneox", lambda: made("gpt_neox", tie_word_embeddings=True, rotary_pct=0.5)),
    "gemma3": ("gemma3", lambda: made("gemma3_text")),
    "gemma3, own head": ("gemma3", lambda: made("gemma3_text", tie_word_embeddings=False)),
    "gemma3, two rotations": ("gemma3", lambda: made("gemma3_text", rope_parameters=TWO_ROTATIONS)),
    "gemma3, every sixth sees all": ("gemma3", lambda: made("gemma3_text", **WINDOWS)),
    "gemma3, no windows": ("gemma3", lambda: made("gemma3_text", layer_types=["full_attention"] * 3)),
    "gemma3, windows only": ("gemma3", lambda: made("gemma3_text", layer_types=["sliding_attention"] * 3)),
    "gemma3, other scale of scores": ("gemma3", lambda: made("gemma3_text", query_pre_attn_scalar=5)),
    "gemma3, bounded logits": ("gemma3", lambda: made("gemma3_text", final_logit_softcapping=5.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(tmp_path, case):
    architecture, make_model = CASES[case]
    model = make_model()
    path = written(model, tmp_path)
    assert header(path)["general.architecture"] == architecture
    assert_same(model, path)


@pytest.mark.parametrize("family", ["qwen3", "phi", "gpt_neox", "gemma3_text"])
def test_with_a_cache(tmp_path, family):
    model = made(family)
    assert_same(model, written(model, tmp_path), cached=True)


def test_sixteen_bits_of_an_activation_cost_little(tmp_path):
    """What a model's own GELU is from that of llama.cpp, also where it is the one with the error function."""
    for family, kind in (("phi", "gelu_new"), ("gpt_neox", "gelu"), ("gpt_neox", "gelu_fast")):
        model, ids = tiny(family, vocab_size=ROWS, hidden_act=kind), token_ids(1)
        with torch.no_grad():
            own = model(ids).logits[0].log_softmax(-1)
            assert 0 < (as_llama_cpp(model)(ids).logits[0].log_softmax(-1) - own).abs().max() < 1e-2


def test_the_cases_can_fail():
    """What only a key or a shift of the file expresses moves the log-probabilities far more than 1e-3."""
    ids = token_ids(1, 24)

    def apart(one, two):
        with torch.no_grad():
            return (one(ids).logits.log_softmax(-1) - two(ids).logits.log_softmax(-1)).abs().max()

    gemma = made("gemma3_text")
    for settings in (
        {"sliding_window": 64}, {"layer_types": ["full_attention"] * 3}, {"query_pre_attn_scalar": 12}, {"rms_norm_eps": 1e-2},
        {"rope_parameters": TWO_ROTATIONS}, {"final_logit_softcapping": 5.0},
    ):  # fmt: skip
        assert apart(gemma, made("gemma3_text", **settings)) > 0.005, settings
    assert apart(made("gpt_neox"), made("gpt_neox", rotary_pct=0.5)) > 0.02
    for family in ("gpt_neox", "phi"):
        assert apart(made(family), made(family, layer_norm_eps=1e-2)) > 0.005
        model = made(family)
        for block in Anatomy(model).blocks:
            nn.init.zeros_(block.get_submodule(FAMILIES[family].mlp.writer).weight)
        assert apart(made(family), model) > 0.02


def test_gemma_of_62_blocks(tmp_path):
    """llama.cpp scales the scores of such a model as those of the one with 27 billion parameters; the queries make up for it."""
    kinds_of_blocks = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(62)]
    gains = {}
    for count in (61, 62):
        model = made("gemma3_text", num_hidden_layers=count, layer_types=kinds_of_blocks[:count], query_pre_attn_scalar=12)
        folder = tmp_path / str(count)
        folder.mkdir()
        gains[count] = matrices(written(model, folder))["blk.0.attn_q_norm.weight"]
        own = 1 + model.model.layers[0].self_attn.q_norm.weight.detach().float()
        assert torch.allclose(gains[count], own * (1 if count == 61 else (8 / 12) ** 0.5))  # 32 / 4 heads, and heads of 12
    ids = token_ids(1, 4)
    with torch.no_grad():
        expected = as_llama_cpp(model)(ids).logits[0].float().log_softmax(-1)
    assert (Runtime(tmp_path / "62" / "m.gguf").log_probabilities(ids[0].tolist(), ROWS) - expected).abs().max() < 1e-2


def test_windows_of_gemma(tmp_path):
    """One number where every sixth block sees all, as readers assume; an array where blocks are gone."""
    model = made("gemma3_text", **WINDOWS)
    keys = header(written(model, tmp_path))
    assert (keys["gemma3.attention.sliding_window"], keys["gemma3.attention.sliding_window_pattern"]) == (8, 6)
    assert keys["gemma3.context_length"] == 64
    (tmp_path / "small").mkdir()
    path = written(remove_blocks(model, [0]), tmp_path / "small")
    assert header(path)["gemma3.attention.sliding_window_pattern"] == [True] * 4 + [False, True]


@pytest.mark.parametrize(("family", "settings"), [("qwen3", {}), ("gemma3_text", WINDOWS | {"head_dim": 256})])
def test_our_own_reader_reads_it_back(tmp_path, monkeypatch, family, settings):
    """Without llama.cpp: the file is read as the model that was written; a Gemma 3 with the usual windows and heads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, ids = made(family, **settings).float(), token_ids()
    again, _ = load(str(written(model, tmp_path)))
    with torch.no_grad():
        assert relative(again(ids).logits, model(ids).logits) < 1e-5


# --- pruned models -------------------------------------------------------------------------------------------------------


# What a method needs for families whose writers do not add to the stream directly, or for a network without output biases.
OPTIONS = {
    ("comp", "gemma3_text"): {"reference": "same input"},
    ("fpt", "gemma3_text"): {"tuning": False},
    ("fpt", "phi"): {"tuning": False},
    ("flap", "qwen3"): {"compensate": False},
}


def pruned(method, family):
    settings = {
        "qwen3": {"tie_word_embeddings": True},
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    }
    model = made(family, num_hidden_layers=4, **settings.get(family, {}))
    return make(method, model, token_ids(), 0.3, **OPTIONS.get((method, family), {}))


PRUNED = [
    (method, family)
    for family in ("qwen3", "phi", "gpt_neox", "gemma3_text")
    for method in STRUCTURED
    if method != "lorap" and not (family == "gpt_neox" and "groups" in METHODS[method].removes)
]


@pytest.mark.parametrize(("method", "family"), PRUNED)
def test_a_pruned_model_is_its_file(tmp_path, method, family):
    """By llama.cpp, or it is refused with the reason and what to do, which is then exported."""
    model = pruned(method, family)
    narrow = family == "phi" and model.config.num_attention_heads != 4
    if family == "qwen3" or not (changes(model) or narrow):
        path = written(model, tmp_path)
        assert header(path)["general.architecture"] in MODEL_TYPES[family]
        assert_same(model, path)
        return
    reason = "its heads together are" if narrow else "its blocks are of unequal widths"
    with pytest.raises(ValueError, match=f"{reason}.*Instead, .*`invoke compress --method wanda-sp`"):
        written(model, tmp_path)
    assert not (tmp_path / "m.gguf").exists()


def test_unequal_blocks_of_a_qwen_3(tmp_path):
    """Other neurons, heads and groups in every block; q, k and v lie one above the other."""
    model = remove_neurons(made("qwen3", tie_word_embeddings=True), [torch.arange(n) for n in (37, 48, 7)])
    model = remove_groups(model, [None, torch.tensor([1]), None])
    path = written(model, tmp_path)
    keys = header(path)
    assert keys["openelm.feed_forward_length"] == [37, 48, 7]
    assert keys["openelm.attention.head_count"] == [4, 2, 4]
    assert keys["openelm.attention.head_count_kv"] == [2, 1, 2]
    attention = model.model.layers[1].self_attn
    whole = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(matrices(path)["blk.1.attn_qkv.weight"], whole.detach().float())
    for cached in (True, False):
        assert_same(model, path, cached)


@pytest.mark.parametrize(
    ("make_model", "reasons"),
    [
        (
            lambda: make("cfsp", made("qwen3"), token_ids(), 0.3),
            r"no GGUF architecture is this qwen3: as 'qwen3' it cannot run, because its blocks are of unequal widths; "
            r"as 'openelm' it cannot run, because its head is another matrix than its table. Instead, compress with .* alike",
        ),
        (
            lambda: make("flap", made("qwen3", tie_word_embeddings=True), token_ids(), 0.3),
            r"as 'openelm' .* its (ffn_down|attn_output) has a bias. Instead, .*--method flap --set compensate=no",
        ),
        (lambda: made("qwen3", attention_bias=True), r"as 'qwen3' it cannot run, because its attn_k has a bias"),
        (lambda: made("qwen3", rope_parameters=LLAMA3), "stretched by a number of its own"),
        (lambda: made("phi", rope_parameters=LLAMA3 | {"partial_rotary_factor": 0.5}), "stretched by a number of its own"),
        (lambda: made("gpt_neox", attention_bias=False), "attention without biases, which readers of GGUF demand"),
        (lambda: made("gpt_neox", hidden_act="relu"), "activation 'relu' cannot be written: readers of GGUF apply gelu"),
        (lambda: made("gemma3_text", hidden_activation="silu"), "activation 'silu'"),
        (lambda: made("gemma3_text", attention_bias=True), "its attn_k has a bias"),
        (lambda: made("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (lambda: made("gemma3_text", use_bidirectional_attention=True), "attends to later tokens"),
        (
            lambda: made("gemma3_text", rope_parameters={kind: TWO_ROTATIONS["full_attention"] for kind in TWO_ROTATIONS}),
            "rotary scaling 'linear' of the blocks with a window",
        ),
        (lambda: tiny("opt", vocab_size=ROWS), "model type 'opt' has no GGUF export here: supported are llama, mistral, qwen2"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(tmp_path, make_model, reasons):
    with pytest.raises(ValueError, match=reasons):
        written(make_model(), tmp_path)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("family", ["phi", "gpt_neox", "gemma3_text"])
def test_the_ways_out_lead_somewhere(tmp_path, family):
    """What a refusal proposes for a family is exported, with the very settings that it names."""
    with pytest.raises(ValueError, match="unequal") as refusal:
        written(make("cfsp", made(family), token_ids(), 0.3), tmp_path)
    proposed = re.search(r"--method ([\w-]+)` or ([\w-]+)", str(refusal.value)).groups()
    for method in proposed:
        (tmp_path / method).mkdir()
        path = written(make(method, made(family), token_ids(), 0.3), tmp_path / method)
        assert (header(path)["general.architecture"],) == MODEL_TYPES[family]


# --- sizes and types -----------------------------------------------------------------------------------------------------

COUNTED = {
    "unequal qwen3": lambda: make("cfsp", made("qwen3", tie_word_embeddings=True).float(), token_ids(), 0.3),
    "tied phi": lambda: tiny("phi", torch.float32, vocab_size=ROWS, tie_word_embeddings=True),
    "gpt_neox": lambda: tiny("gpt_neox", torch.float32, vocab_size=ROWS),
    "fewer blocks of gemma3": lambda: make("shortgpt", tiny("gemma3_text", torch.float32, vocab_size=ROWS), token_ids(), 0.3),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_a_file_has_the_bytes_that_were_counted(tmp_path, case):
    model = COUNTED[case]()
    for dtype in DTYPES:
        (tmp_path / dtype).mkdir()
        path = written(model, tmp_path / dtype, dtype)
        assert FileSize(tmp_path / dtype / "m", "m", dtype)(model) == path.stat().st_size


def test_a_file_can_be_filled_up_for_another_tool(tmp_path):
    """Neurons of zeros, up to the 256 numbers that K-quants store together: the model is the same."""
    model, tokenizer = make("cfsp", made("qwen3", tie_word_embeddings=True), token_ids(), 0.3), load("wiki-a-llama")[1]
    folder = save(model, tokenizer, tmp_path / "m")
    path = to_gguf(folder, tmp_path / "m.gguf", "float32", fill=256)
    shapes = {name: value.shape for name, value in matrices(path).items()}
    assert {shape[1] for name, shape in shapes.items() if "ffn_down" in name} == {256}
    assert {shape[0] for name, shape in shapes.items() if "ffn_gate" in name or "ffn_up" in name} == {256}
    assert_same(model, path)
    with pytest.raises(ValueError, match="fill is 0: give a whole number"):
        to_gguf(folder, tmp_path / "none.gguf", fill=0)


@pytest.mark.parametrize("family", ["qwen3", "phi", "gpt_neox", "gemma3_text"])
def test_quantised_files_run(tmp_path, family):
    settings = dict(intermediate_size=64, tie_word_embeddings=True) | (
        {"head_dim": 16} if family in ("qwen3", "gemma3_text") else {}
    )
    model = tiny(family, torch.float32, vocab_size=ROWS, **settings)
    if family == "qwen3":
        model = remove_neurons(model, [torch.arange(32), None, None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = written(model, tmp_path, "Q8_0")
    assert set(kinds(path).type) == {"F32", "Q8_0"}
    ids = token_ids(1, 6)
    with torch.no_grad():
        expected = model(ids).logits[0].softmax(-1)
    assert relative(Runtime(path).log_probabilities(ids[0].tolist(), ROWS).exp(), expected) < 0.15


def test_every_family_is_known_or_refused():
    """Each family of the suite has architectures, or none; each architecture serves some family."""
    assert set(FAMILIES) - set(MODEL_TYPES) == {"opt"}  # llama.cpp has no OPT
    assert {name for names in MODEL_TYPES.values() for name in names} == set(ARCHITECTURES)
