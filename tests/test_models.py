"""Loading by name: embedded, folder, and what is said when there is no such model."""

import copy
import dataclasses
import json

import pytest
import torch

import tasks
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import load_corpus, sample_blocks, tokens_of
from lib.models import checkpoint
from lib.models import load as models
from lib.models.checkpoint import fingerprint
from lib.models.load import load, spread
from lib.papers.slicegpt import slice_model
from lib.primitives.anatomy import FAMILIES
from lib.primitives.surgery import cast
from tests.conftest import tiny


@pytest.mark.parametrize("name", models.EMBEDDED)
def test_embedded_models_are_plain_folders_with_a_history(name):
    import transformers

    model, tokenizer = load(name)
    folder = models.ASSETS / name
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The history of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not model.training
    assert (folder / "model.safetensors").stat().st_size < 10e6
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    assert manifest["reached"]["validation_loss"] == min(point["validation_loss"] for point in manifest["curve"])


@pytest.mark.parametrize("name", models.EMBEDDED)
def test_embedded_models_have_the_loss_of_their_manifest(name):
    from lib.evaluation.text import load_corpus, tokens_of, windows
    from lib.suite.workshop import CONTEXT, validation_loss

    model, tokenizer = load(name)
    blocks = windows(tokens_of(load_corpus("wiki-a", "validation"), tokenizer), CONTEXT)
    manifest = json.loads((models.ASSETS / name / "manifest.json").read_text())
    assert validation_loss(model, blocks) == pytest.approx(manifest["reached"]["validation_loss_bf16"], abs=2e-3)


def test_embedded_anatomies_differ_as_promised():
    llama, opt = (load(name)[0].config for name in models.EMBEDDED)
    assert llama.num_key_value_heads < llama.num_attention_heads
    assert not llama.tie_word_embeddings
    assert opt.tie_word_embeddings
    assert opt.do_layer_norm_before


def test_local_folder(tmp_path):
    model = tiny("opt", torch.float32)
    model.save_pretrained(tmp_path)
    load("wiki-a-opt")[1].save_pretrained(tmp_path)
    again, _ = load(str(tmp_path), dtype="float32")
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([[1, 2, 3]])).logits, model(torch.tensor([[1, 2, 3]])).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wiki-a-gpt", "wiki-a-llama, wiki-a-opt"),
        ("./nowhere", "no folder"),
        ("/nonexistent/model", "no folder"),
        ("someone/some-model", "network"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load(name)


def test_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(str(tmp_path))


def test_unknown_dtype():
    with pytest.raises(ValueError, match="float32, bfloat16"):
        load("wiki-a-opt", dtype="int3")


def test_fingerprint_sees_one_changed_weight():
    model = tiny("llama", torch.bfloat16)
    before = fingerprint(model)
    assert before == fingerprint(tiny("llama", torch.bfloat16))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 1
    assert fingerprint(model) != before


def test_a_spread_model_scores_the_same(tmp_path):
    """Blocks and head on disk, fetched where they run; the same perplexity to the last bit, for a compressed model too."""
    dense, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, 4, 64, torch.Generator().manual_seed(0))
    stream = tokens_of(load_corpus("wiki-a", "test"), tokenizer)
    for name, model in (("dense", dense), ("sliced", slice_model(dense, ids, 0.25))):
        expected = perplexity(model, stream, 64, 4)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        moved = spread(copy.deepcopy(model), {"cpu": int(0.7 * weights)}, tmp_path / name)
        assert {"cpu", "disk"} <= {str(place) for place in moved.hf_device_map.values()}
        assert list((tmp_path / name).glob("*.dat"))
        assert perplexity(moved, stream, 64, 4) == expected


def test_evaluate_on_all_devices_there_are(capsys):
    for device in ("cpu", "auto"):
        tasks.evaluate.body(None, "wiki-a-llama", length=64, windows=2, device=device)
    one, two = capsys.readouterr().out.splitlines()
    assert one == two
    assert "perplexity" in one


def test_a_record_with_one_norm_for_two_serial_halves_is_refused():
    family = FAMILIES["llama"]
    with pytest.raises(ValueError, match="both halves name the norm 'input_layernorm'"):
        dataclasses.replace(family, mlp=dataclasses.replace(family.mlp, norm=family.attention.norm))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_cast_gives_the_model_that_transformers_loads_in_that_precision(family, tmp_path):
    import transformers

    model = tiny(family, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ours, plain = cast(copy.deepcopy(model), torch.bfloat16), copy.deepcopy(model).to(torch.bfloat16)
    ids = torch.randint(80, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, loaded(ids).logits)
        assert not torch.equal(plain(ids).logits, loaded(ids).logits)  # its rotary frequencies are rounded


def test_a_compressed_model_is_cast_like_a_dense_one(tmp_path):
    dense, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, 4, 64, torch.Generator().manual_seed(0))
    small = slice_model(dense, ids, 0.25)
    checkpoint.save(small, tokenizer, tmp_path / "small")
    loaded, _ = load(str(tmp_path / "small"), dtype="bfloat16")
    frequencies = {name: buffer for name, buffer in dense.named_buffers() if name.endswith("inv_freq")}
    assert frequencies
    for name, buffer in frequencies.items():
        assert torch.equal(loaded.get_buffer(name), buffer)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, cast(small, torch.bfloat16)(ids).logits)
