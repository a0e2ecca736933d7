"""A model folder is what it says, or it is refused: by one sentence, before any work, and alike from memory and from disk."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lib.compress import compress
from lib.evaluation.text import Calibration
from lib.models.checkpoint import export
from lib.models.disk import model_on_disk
from lib.models.gguf_export import to_gguf
from lib.models.load import load, locate
from lib.primitives.low_rank import merge_to_dense
from tests.conftest import tiny, token_ids

FEW = Calibration("wiki-a", 4, 32)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def folder_of(model, folder, **how):
    """A model saved as the hub has it, with the tokenizer of the embedded model, whose vocabulary it has."""
    model.save_pretrained(folder, **how)
    for name in TOKENIZER:
        shutil.copy(f"{locate('wiki-a-llama')}/{name}", folder)
    return folder


def dense(family="llama", **settings):
    return tiny(family, torch.float32, vocab_size=2048, **settings)


def edit(folder, name="config.json", **changes):
    said = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(said | changes))


def rewrite(folder, change):
    """Change the tensors of a folder, as a dictionary, in place."""
    file = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- refusals ---------------------------------------------------------------------------------------------------------


def cut_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def quantised(kind, **more):
    return lambda folder: edit(folder, quantization_config={"quant_method": kind} | more)


def vision(folder):
    (folder / "config.json").write_text(json.dumps(transformers.Gemma3Config().to_dict()))


def lose_a_shard(folder):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_token(folder):
    said = json.loads((folder / "tokenizer.json").read_text())
    pair = said["model"]["merges"][-1]
    del said["model"]["vocab"][
        pair if isinstance(pair, str) and pair in said["model"]["vocab"] else "".join(pair).replace(" ", "")
    ]
    (folder / "tokenizer.json").write_text(json.dumps(said))


DAMAGES = {
    "half a file": (cut_file, "model.safetensors is missing, cut short or damaged"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "missing, cut short or damaged"),
    "a lost shard": (lose_a_shard, "model-00001-of-00002.safetensors is missing"),
    "a broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
    "more blocks than weights": (lambda f: edit(f, num_hidden_layers=5), "no tensor model.layers.3.self_attn.q_proj.weight"),
    "fewer blocks than weights": (lambda f: edit(f, num_hidden_layers=2), "model.layers.2.* belongs to no part"),
    "another width": (lambda f: edit(f, intermediate_size=64), r"gate_proj.weight in .* is \(48, 32\), but .* needs \(64, 32\)"),
    "a tensor that no module took": (
        lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "extra in .* belongs to no part of the model",
    ),
    "whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})), "quantised to I8",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "names the model type None"),
    "impossible numbers": (lambda f: edit(f, num_attention_heads=5), "config.json cannot be read: .*multiple|heads"),
    "code of its own": (lambda f: edit(f, model_type="mine", auto_map={"AutoConfig": "c.C"}), "code of its own, .* never run"),
    "an unknown type": (lambda f: edit(f, model_type="mine"), "model type 'mine', which transformers does not know"),
    "images": (vision, "'gemma3', for more than text"),
    "GPTQ": (quantised("gptq", bits=4), r"quantised \(gptq\)"),
    "AWQ": (quantised("awq", bits=4), r"quantised \(awq\)"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes\)"),
    "compressed-tensors": (quantised("compressed-tensors", config_groups={}), r"quantised \(compressed-tensors\)"),
    "MXFP4": (quantised("mxfp4"), r"quantised \(mxfp4\)"),
    "FP8 with measured activations": (quantised("fp8", activation_scheme="static"), r"quantised \(fp8\)"),
    "a type that is a list": (lambda f: edit(f, model_type=["llama"]), r"names the model type \['llama'\]"),
    "a dtype that is none": (lambda f: edit(f, dtype=True), "has dtype True, in which no model works"),
    "blocks without end": (lambda f: edit(f, num_hidden_layers=2**63), "has num_hidden_layers 9223372036854775808: models have"),
    "more tokens than memory": (lambda f: edit(f, vocab_size=10**12), "has vocab_size 1000000000000: models have"),
    "fewer heads than none": (lambda f: edit(f, num_attention_heads=-4), "has num_attention_heads -4"),
    "no share": (lambda f: edit(f, attention_dropout=float("nan")), "has attention_dropout nan: it is a share"),
    "a rotation of more than all": (
        lambda f: edit(f, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}),
        "has partial_rotary_factor 1.5: it is a share",
    ),
    "a window of less than nothing": (lambda f: edit(f, sliding_window=-3), "has sliding_window -3"),
    "a tie of two matrices": (
        lambda f: edit(f, tie_word_embeddings=True), "lm_head.weight in .* is another matrix than model.embed_tokens.weight",
    ),
    "a tokenizer of wrong merges": (lose_a_token, "tokenizer in .* cannot be read: Token `.*` out of vocabulary"),
    "a padding that is a word": (lambda f: edit(f, "generation_config.json", pad_token_id="12"), "generation_config.json"),
    "a stop that is no token": (lambda f: edit(f, "generation_config.json", eos_token_id={}), r"names the eos_token_id \{\}"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer in .* cannot be read"),
    "no tokenizer": (lambda f: [(f / name).unlink() for name in TOKENIZER], "has no tokenizer files"),
    "a broken generation config": (lambda f: (f / "generation_config.json").write_text("["), "generation_config.json cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_alike_before_any_weight_is_read(tmp_path, monkeypatch, damage, streamed):
    folder = folder_of(dense(), tmp_path / "dense")
    change, message = DAMAGES[damage]
    change(folder)
    monkeypatch.setattr("lib.compress.sample_blocks", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(ValueError, match=message):
        compress(str(folder), tmp_path / "out", "wanda", 0.5, FEW, streamed=streamed)
    if not streamed:
        with pytest.raises(ValueError, match=message):
            load(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


EXPORTS = (
    "a tie of two matrices",
    "a tokenizer of wrong merges",
    "a padding that is a word",
    "a stop that is no token",
    "blocks without end",
)


@pytest.mark.parametrize("damage", EXPORTS)
def test_refused_alike_by_the_export(tmp_path, damage):
    folder = folder_of(dense(), tmp_path / "dense")
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message):
        to_gguf(folder, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_numbers_that_gguf_cannot_hold(tmp_path):
    folder = folder_of(dense(), tmp_path / "dense")
    edit(folder, rms_norm_eps=1e300)
    with pytest.raises(ValueError, match="a number in the configuration of .* has no place in GGUF"):
        to_gguf(folder, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_pickled_weights_are_checked_too(tmp_path):
    folder = folder_of(dense(), tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load(str(folder))
    tensors.pop("model.norm.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing keys model\.norm\.weight"):
        load(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"PK but cut short")
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(str(folder))


def test_other_models_are_refused_by_their_configuration(tmp_path, monkeypatch):
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=2048, hidden_size=48, n_layer=2, n_head=4))
    folder = folder_of(bloom, tmp_path / "bloom")
    monkeypatch.setattr("lib.compress.load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="model type 'bloom' is not known here: .* fused in one matrix.* Supported are gemma3"):
        compress(str(folder), tmp_path / "out", "wanda", 0.5, FEW)


# --- what is read -----------------------------------------------------------------------------------------------------


def fp8_folder(folder, tile=8):
    """A Qwen 3 as it is published in FP8: matrices of the blocks as numbers of 8 bits, with one scale for each tile."""
    folder_of(dense("qwen3", hidden_size=32, intermediate_size=48, head_dim=16), folder)

    def to_fp8(tensors):
        for name in [name for name in tensors if "_proj.weight" in name]:
            w = tensors[name]
            tiles = w.view(w.shape[0] // tile, tile, w.shape[1] // tile, tile)
            scale = tiles.abs().amax((1, 3)) / 448
            tensors[name] = (tiles / scale[:, None, :, None]).view(w.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale

    before = load_file(folder / "model.safetensors")
    rewrite(folder, to_fp8)
    said = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[tile, tile])
    edit(folder, quantization_config=said)
    return folder, before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_undone_alike_in_memory_and_from_disk(tmp_path, dtype):
    """In memory transformers multiplies the scales, from disk this suite: the same bits, close to what was quantised."""
    folder, before = fp8_folder(tmp_path / "fp8")
    model, _ = load(str(folder), dtype=dtype)
    found = model.state_dict()
    stored = dict(model_on_disk(folder, getattr(torch, dtype)).stored.read(before))
    for name, value in before.items():
        assert torch.equal(found[name], stored[name]), name
        error = (found[name].float() - value).abs().max() / value.abs().max()
        assert error < (0.04 if "_proj" in name else 0.004), name  # three bits of mantissa in FP8
    name = "model.layers.0.mlp.up_proj.weight"
    assert (found[name] != before[name]).float().mean() > 0.9
    for streamed in (False, True):
        out = tmp_path / f"out-{streamed}"
        compress(str(folder), out, "wanda", 0.0, FEW, dtype=dtype, streamed=streamed)
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert not hasattr(again.config, "quantization_config")
        assert all(torch.equal(value, found[name]) for name, value in again.state_dict().items())


def test_fp8_without_its_scales_is_refused(tmp_path):
    folder, _ = fp8_folder(tmp_path / "fp8")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale_inv"))
    for streamed in (False, True):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight in .* is quantised to F8_E4M3"):
            compress(str(folder), tmp_path / "out", "wanda", 0.0, FEW, streamed=streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_old_names_and_computed_tables_of_gpt_neox(tmp_path, streamed):
    """Published files call the head embed_out and hold causal masks and rotary frequencies; results keep the published name."""
    model = dense("gpt_neox")
    folder = folder_of(model, tmp_path / "dense")

    def as_published(tensors):
        assert "embed_out.weight" in tensors
        for i in range(3):
            tensors[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 64, 64)
            tensors[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
            tensors[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(folder, as_published)
    compress(str(folder), tmp_path / "out", "wanda", 0.0, FEW, streamed=streamed)
    names = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert "embed_out.weight" in names
    assert "lm_head.weight" not in names
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_tied_head_may_be_stored_too(tmp_path):
    folder = folder_of(dense(tie_word_embeddings=True), tmp_path / "dense")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    for streamed in (False, True):
        compress(str(folder), tmp_path / f"out-{streamed}", "wanda", 0.5, FEW, streamed=streamed)


# --- what travels -----------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
# save_pretrained refuses sampling settings beside greedy generation, which published models have.
SAID = {"eos_token_id": [7, 0], "bos_token_id": 0, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9}
RESULTS = {
    "stock": ("wanda", 0.5, False, {}),
    "stock, streamed": ("sparsegpt", 0.5, True, {}),
    "a narrower class": ("slicegpt-stock", 0.25, False, {}),
    "a record of edits": ("slicegpt", 0.25, False, {}),
    "a record of edits, streamed": ("svd-llm", 0.3, True, {}),
    "blocks gone": ("shortgpt", 0.34, False, {}),
    "blocks gone, streamed": ("comp", 0.34, True, {"rho": 1.0}),
}


@pytest.mark.parametrize("result", RESULTS)
def test_stop_tokens_and_chat_template_travel(tmp_path, result):
    folder = folder_of(dense("llama"), tmp_path / "dense")
    (folder / "generation_config.json").write_text(json.dumps(SAID))
    (folder / "chat_template.jinja").write_text(CHAT)
    method, ratio, streamed, values = RESULTS[result]
    compress(str(folder), tmp_path / "out", method, ratio, FEW, streamed=streamed, **values)
    model, tokenizer = load(str(tmp_path / "out"))
    assert {name: getattr(model.generation_config, name) for name in SAID} == SAID
    assert tokenizer.chat_template == CHAT
    # The first token that the model says is a stop token, so it says no other.
    ids = token_ids(1, 8)
    first = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    edit(tmp_path / "out", "generation_config.json", eos_token_id=[1234, first])
    model, _ = load(str(tmp_path / "out"))
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 9)


def test_stop_tokens_travel_through_merging(tmp_path):
    folder = folder_of(dense("qwen2"), tmp_path / "dense")
    (folder / "generation_config.json").write_text(json.dumps(SAID))
    compress(str(folder), tmp_path / "small", "svd", 0.3, FEW)
    model, tokenizer = load(str(tmp_path / "small"))
    export(merge_to_dense(model), tokenizer, tmp_path / "merged")
    assert {name: json.loads((tmp_path / "merged/generation_config.json").read_text())[name] for name in SAID} == SAID


def test_the_dtype_is_the_models_own_unless_one_is_given(tmp_path):
    folder = folder_of(dense().bfloat16(), tmp_path / "dense")
    own, wide = torch.bfloat16, torch.float32
    for streamed, dtype, expected in ((False, None, own), (True, None, own), (False, "float32", wide), (True, "float32", wide)):
        out = tmp_path / f"{streamed}-{dtype}"
        row = compress(str(folder), out, "svd-llm", 0.25, FEW, dtype=dtype, streamed=streamed)
        model, _ = load(str(out), dtype=None)
        assert model.dtype == expected
        assert row["bytes"] == row["params"] * expected.itemsize
