"""A compressed model is a model: saved, reloaded in a fresh process, generated with, evaluated; damage is refused."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invoke import Exit

import tasks
from lib.compress import compress
from lib.evaluation.process import peak_memory
from lib.evaluation.text import Calibration
from lib.evaluation.zero_shot import zero_shot
from lib.methods import make
from lib.models import checkpoint
from lib.models.checkpoint import CheckpointError, export, is_checkpoint, load_checkpoint, save
from lib.models.load import load
from lib.papers.slicegpt import global_axes, slice_globally, slice_model, slice_without_shortcuts, stock_model
from lib.papers.svd_llm import compress_model
from lib.primitives.anatomy import Anatomy
from lib.primitives.structured import remove_neurons
from tests.conftest import CONFIGS, SLICEABLE, relative, tiny, token_ids


def uneven_widths(model):
    """Widths that rise and fall from junction to junction."""
    widths = (24, 28, 20, 31, 16, 27, 30)
    return [*widths[: Anatomy(model).junctions - 1], 32]


# A line per way of compressing; later methods join here. Each maps a dense model to a compressed one.
WAYS = {
    "slicegpt, low-rank": lambda m: slice_model(m, token_ids(), 0.25, layout="low-rank"),
    "slicegpt, dense shortcuts": lambda m: slice_model(m, token_ids(), 0.25, layout="dense"),
    "slicegpt, sliced head": lambda m: slice_model(m, token_ids(), 0.5, slice_head=True),
    "slicegpt, level 0": lambda m: slice_model(m, token_ids(), 0.0, layout="low-rank"),
    "slicegpt, tied": lambda m: slice_model(m, token_ids(), 0.25, layout="tied"),
    "slicegpt, one basis": lambda m: slice_globally(m, global_axes(m, token_ids()), 24),
    "slicegpt, one basis, whole head": lambda m: slice_globally(m, global_axes(m, token_ids()), 24, slice_head=False),
    "slicegpt, schedule": lambda m: slice_model(m, token_ids(), uneven_widths(m), layout="low-rank"),
    "slicegpt, compensated": lambda m: slice_model(m, token_ids(), 0.25, layout="low-rank", compensate=True),
    "slicegpt, few shortcut columns": lambda m: slice_model(m, token_ids(), 0.25, layout="low-rank", drop_below=0.3),
    "svd-llm": lambda m: compress_model(m, token_ids(), 0.4),
    "svd-llm, unequal ranks": lambda m: compress_model(m, token_ids(), 0.3, allocation="loss"),
}
FAMILIES_OF = dict.fromkeys(WAYS, SLICEABLE) | {"svd-llm": tuple(CONFIGS)}
CASES = [(way, family) for way in WAYS for family in FAMILIES_OF[way]]

FRESH = """
import sys, torch
from lib.evaluation.zero_shot import zero_shot
from lib.models.load import load
for folder, dtype in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    model, tokenizer = load(folder, dtype=dtype)
    ids = torch.load(f"{folder}.pt", weights_only=True)["ids"]
    with torch.no_grad():
        out = {"logits": model(ids).logits}
    for cache in (True, False):
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        out[str(cache)] = model.generate(ids[:2], use_cache=cache, **settings)
    out["accuracy"] = zero_shot(model, tokenizer, limit=20)[0]["acc"]
    torch.save(out, f"{folder}.pt")
"""


def test_reload_in_a_fresh_process(tmp_path):
    ids, made, command = torch.arange(1, 1001).view(10, 100), {}, [sys.executable, "-c", FRESH]
    for dtype, layout in (("float32", "tied"), ("bfloat16", "low-rank")):
        model, tokenizer = load("wiki-a-opt", dtype=dtype)
        folder = tmp_path / layout
        made[folder] = slice_model(model, ids, 0.25, layout=layout)
        save(made[folder], tokenizer, folder, base="wiki-a-opt")
        torch.save({"ids": ids}, f"{folder}.pt")
        command += [str(folder), dtype]
    subprocess.run(command, check=True, cwd=Path(tasks.__file__).parent, capture_output=True)
    for folder, small in made.items():
        found = torch.load(f"{folder}.pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(found["logits"], small(ids).logits)
        assert torch.equal(found["True"], found["False"])
        assert found["accuracy"] == zero_shot(small, tokenizer, limit=20)[0]["acc"]


@pytest.mark.parametrize(("way", "family"), CASES)
def test_reload_gives_the_same_bits(tmp_path, way, family):
    small = WAYS[way](tiny(family, torch.float32, tie_word_embeddings="tied" in way))
    again = load_checkpoint(save(small, None, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, small(token_ids()).logits)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(*(again.generate(token_ids(2), use_cache=cache, **settings) for cache in (True, False)))
    assert again.edits == small.edits
    assert not again.training
    assert not [p for p in again.parameters() if p.is_meta]
    twice = load_checkpoint(save(again, None, tmp_path / "n"))  # a loaded model can be saved again
    with torch.no_grad():
        assert torch.equal(twice(token_ids()).logits, small(token_ids()).logits)


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    small = WAYS["slicegpt, low-rank"](tiny("llama", torch.float32))
    folder = save(small, None, tmp_path / "m")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name.startswith("compressed-00001-of-")
    assert all(f.stat().st_size < 25_000 for f in files)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(folder)(token_ids()).logits, small(token_ids()).logits)


def test_plain_transformers_does_not_load_it_silently(tmp_path):
    import transformers

    folder = save(WAYS["slicegpt, low-rank"](tiny("llama", torch.float32)), None, tmp_path / "m")
    with pytest.raises(OSError, match="no file named|does not appear"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_dense_models_and_existing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no record of edits"):
        save(tiny("llama"), None, tmp_path / "m")
    small = WAYS["slicegpt, low-rank"](tiny("llama"))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="choose another"):
        save(small, None, tmp_path / "there")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    small = WAYS["slicegpt, low-rank"](tiny("llama"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(small, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="JSON"):
        save(small, None, tmp_path / "m", base=object())
    assert list(tmp_path.iterdir()) == []


def test_no_space_on_the_device(small_disk):
    with pytest.raises(Exit, match="nothing was written") as stop:
        tasks.compress.body(None, "wiki-a-llama", str(small_disk / "out"), samples=4, length=32)
    assert stop.value.code == 1
    assert list(small_disk.iterdir()) == []


def test_a_schedule_is_taken_over_from_a_saved_model(tmp_path):
    settings = dict(calibration=Calibration("wiki-a", 8, 64), ratio=0.25, round_interval=1)
    constant = compress("wiki-a-llama", tmp_path / "constant", **settings)
    variance = compress("wiki-a-llama", tmp_path / "variance", schedule="variance", **settings)
    assert 0.98 * constant["params"] < variance["params"] <= constant["params"]
    again = compress("wiki-a-llama", tmp_path / "again", schedule=str(tmp_path / "variance"), **settings)
    assert again["params"] == variance["params"]
    widths = [load(str(tmp_path / name))[0].edits[0]["widths"] for name in ("constant", "variance", "again")]
    assert widths[1] == widths[2] != widths[0]
    assert len(set(widths[0][:-1])) == 1 < len(set(widths[1][:-1]))


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        compress("wiki-a-opt", tmp_path / name, calibration=Calibration("wiki-a", 4, 32))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "compressed.safetensors" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(WAYS["slicegpt, low-rank"](tiny("opt", torch.float32)), None, tmp_path_factory.mktemp("saved") / "m", base="tiny")


def changed_copy(saved, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    record = json.loads((folder / "compression.json").read_text())
    change(folder, record)
    if (folder / "compression.json").exists() and record is not None:
        (folder / "compression.json").write_text(json.dumps(record))
    return folder


def first_shard(record):
    return next(iter(record["shards"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, r: r.update(schema=1), "schema 1"),
        (lambda f, r: r.clear(), "schema None"),
        (lambda f, r: r.update(edits=[]), "lacks edits"),
        (lambda f, r: r.update(dtype="int8"), "lacks edits, dtype"),
        (lambda f, r: r["edits"][0].update(edit="unknown"), "unknown edit 'unknown'"),
        (lambda f, r: r["edits"][0].update(edit=["slicegpt"]), "unknown edit"),
        (lambda f, r: r["edits"][0]["widths"].__setitem__(1, 25), "cannot be repeated|has shape"),
        (lambda f, r: r["edits"][0]["widths"].__setitem__(0, -1), "as many widths"),
        (lambda f, r: r["edits"][0]["widths"].pop(), "cannot be repeated"),
        (lambda f, r: r["edits"][0].update(widths=24), "are lists"),
        (lambda f, r: r["edits"][0]["ranks"].__setitem__(1, 9), "do not fit"),
        (lambda f, r: r["edits"][0]["ranks"].__setitem__(1, "8"), "whole numbers or null"),
        (lambda f, r: r["edits"][0].update(layout="dense"), "do not fit|has shape|disagree"),
        (lambda f, r: r["edits"][0].update(layout="tied"), "disagree|has shape|shares the embedding"),
        (lambda f, r: r["edits"][0].update(compensated=3), "true or false"),
        (lambda f, r: r["edits"][0].update(surprise=1), "cannot be repeated"),
        (lambda f, r: first_shard(r).pop("lm_head.weight"), "not expected|missing"),
        (lambda f, r: first_shard(r)["lm_head.weight"].update(shape=[1, 2]), "has shape"),
        (lambda f, r: first_shard(r)["lm_head.weight"].update(dtype="torch.int8"), "the record says torch.int8"),
        (lambda f, r: r["shards"].update({"../x": {}}), "lacks edits, dtype or shards"),
        (lambda f, r: (f / "compressed.safetensors").unlink(), "missing or damaged"),
        (lambda f, r: (f / "config.json").unlink(), "cannot be read"),
        (lambda f, r: (f / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
    ],
)
def test_damage_is_refused(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(changed_copy(saved, tmp_path, change))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "map names"),
        ([1], "map names"),
        ({"lm_head": 4}, "no such truncation.*lm_head"),
        ({"model.layers.0.mlp.up_proj": 0}, "no such truncation"),
        ({"model.layers.0.mlp.up_proj": 33}, "no such truncation"),
        ({"model.layers.0.mlp.up_proj": True}, "no such truncation"),
        ({"model.layers.0.mlp.up_proj": 4}, "disagree"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path, ranks, message):
    folder = save(WAYS["svd-llm"](tiny("llama", torch.float32)), None, tmp_path / "m")
    damaged = changed_copy(folder, tmp_path, lambda f, r: r["edits"][0].update(ranks=ranks))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(damaged)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(saved, tmp_path, keep):
    folder = changed_copy(saved, tmp_path, lambda f, r: None)
    weights = folder / "compressed.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_checkpoint(folder)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"compression.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "compression.json").write_text("{")
    assert is_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_checkpoint(tmp_path)


def paths_in(value, prefix=()):
    """Every place in a JSON value."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*prefix, key))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(allow_nan=False), st.text(max_size=5), st.just([]), st.just({})
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_record_is_refused_or_harmless(saved, tmp_path, data):
    record = json.loads((saved / "compression.json").read_text())
    places = [p for p in paths_in(record) if p and p[0] != "provenance"]
    place, junk = data.draw(st.sampled_from(places)), data.draw(JUNK)

    def change(folder, record):
        inner = record
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = junk

    folder = changed_copy(saved, tmp_path, change)
    try:
        loaded = load_checkpoint(folder)
    except CheckpointError:
        return
    with torch.no_grad():  # what loads in spite of the change is the model that was saved
        assert torch.equal(loaded(token_ids()).logits, load_checkpoint(saved)(token_ids()).logits)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_tensor_header_is_refused_or_harmless(saved, tmp_path, data):
    def change(folder, record):
        path = folder / "compressed.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = bytearray(content[: 8 + size])
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(header) + content[8 + size :])

    folder = changed_copy(saved, tmp_path, change)
    try:
        loaded = load_checkpoint(folder)
    except CheckpointError:
        return
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in load_checkpoint(saved).named_parameters()
    }


def test_loading_needs_little_more_than_the_weights(tmp_path):
    model = tiny(
        "llama", torch.float32, hidden_size=512, intermediate_size=1408, vocab_size=4000, num_hidden_layers=6, head_dim=64
    )
    folder = save(slice_model(model, token_ids(), 0.25), None, tmp_path / "m")
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert size > 40e6
    load_checkpoint(folder)  # imports happen once
    peak = peak_memory(lambda: load_checkpoint(folder))
    assert peak is None or peak < 1.3 * size


# --- stock export ----------------------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch, transformers
folder, tokens = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = torch.load(tokens, weights_only=True)["ids"]
with torch.no_grad():
    torch.save({"logits": model(ids).logits, "text": model.generate(ids[:1], max_new_tokens=4, do_sample=False)}, tokens)
assert "lib" not in sys.modules
"""


WITHOUT_SHORTCUTS = {
    "one basis": lambda model, ids: slice_globally(model, global_axes(model, ids), 96),
    "turned bases": lambda model, ids: slice_without_shortcuts(model, ids, 0.25),
}


@pytest.mark.parametrize("way", WITHOUT_SHORTCUTS)
def test_export_loads_without_this_package(tmp_path, way):
    model, tokenizer = load("wiki-a-llama")
    ids = torch.arange(1, 1001).view(10, 100)
    narrow = stock_model(WITHOUT_SHORTCUTS[way](model, ids))
    folder = export(narrow, tokenizer, tmp_path / "stock")
    torch.save({"ids": ids}, tmp_path / "tokens.pt")
    subprocess.run([sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "tokens.pt")], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "tokens.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(found["logits"], narrow(ids).logits)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 96


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("k", [32, 24, 9])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_stock_model_is_the_sliced_network_without_shortcuts(family, k):
    """The stock norm with gain √(d/k) and epsilon ε d/k against our own norm that divides by d."""
    model = tiny(family)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-3  # large enough to show
    model.config.rms_norm_eps = 1e-3
    axes = global_axes(model, token_ids())
    sliced = slice_globally(model, axes, k)
    stock = stock_model(sliced)
    with torch.no_grad():
        assert relative(stock(token_ids()).logits, sliced(token_ids()).logits) < 1e-10
        assert (relative(stock(token_ids()).logits, model(token_ids()).logits) < 1e-10) == (k == 32)
    assert type(stock) is type(model)
    turned = slice_without_shortcuts(model, token_ids(), 1 - k / 32, round_interval=1)
    with torch.no_grad():
        assert relative(stock_model(turned)(token_ids()).logits, turned(token_ids()).logits) < 1e-10
        assert (relative(turned(token_ids()).logits, model(token_ids()).logits) < 1e-10) == (k == 32)


@pytest.mark.parametrize(("family", "message"), [("opt", "not a stock model"), ("phi", "not a stock"), ("qwen3", "q_norm")])
def test_families_without_a_stock_form_are_refused(family, message):
    with pytest.raises(ValueError, match=message):
        stock_model(slice_globally(tiny(family), torch.eye(32, dtype=torch.float64), 24))


def test_networks_without_a_stock_form_are_refused():
    model = tiny("llama")
    for options in ({}, {"slice_head": True}, {"slice_head": True, "drop_below": 9.0, "compensate": True}):
        with pytest.raises(ValueError, match="slice_without_shortcuts"):
            stock_model(slice_model(model, token_ids(), 0.25, **options))
    with pytest.raises(ValueError, match="not sliced"):
        stock_model(model)


def test_export_names_what_is_not_stock(tmp_path):
    """All of it, where a model has more than one such part."""
    with pytest.raises(ValueError, match="slicegpt added shortcuts to it.*slicegpt-stock"):
        export(WAYS["slicegpt, low-rank"](tiny("llama")), None, tmp_path / "m")
    narrow = make("modegpt", tiny("llama"), token_ids(), 0.3, attention="all", temperature=math.inf)
    assert {edit["edit"] for edit in narrow.edits} == {"narrow-heads"}
    with pytest.raises(ValueError, match="modegpt left its attention heads narrower.*--set attention=none") as stopped:
        export(narrow, None, tmp_path / "m")
    assert "unequally wide" not in str(stopped.value)
    with pytest.raises(ValueError, match="heads narrower.*--set attention=none.*unequally wide.*wanda-sp"):
        export(remove_neurons(narrow, [torch.arange(9), None, None]), None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["slicegpt-stock", "slicegpt-global"])
def test_compress_to_a_stock_model(tmp_path, method):
    import transformers

    row = compress("wiki-a-llama", tmp_path / "m", method, 0.25, Calibration("wiki-a", 8, 64))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert plain.config.hidden_size == 96
    assert plain.num_parameters() == row["params"]
    assert row["removed_model"] == pytest.approx(0.25, abs=1e-3)


# --- from the command line -----------------------------------------------------------------------------------------------


def test_compress_evaluate_generate(tmp_path, capsys):
    out = str(tmp_path / "small")
    tasks.compress.body(None, "wiki-a-llama", out, samples=16, length=64, set=["round_interval=1"])
    said = capsys.readouterr().out
    assert "really removed" in said
    record = json.loads((tmp_path / "small" / "compression.json").read_text())["provenance"]
    assert record["base"]["name"] == "wiki-a-llama"
    assert record["calibration"]["samples"] == 16
    assert record["calibration"]["corpus"] == "wiki-a"
    tasks.evaluate.body(None, out, windows=4)
    tasks.evaluate.body(None, "wiki-a-llama", windows=4)
    small, dense = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert dense < small < 3 * dense
    tasks.generate.body(None, out, "The history of", tokens=5)
    assert capsys.readouterr().out.startswith("The history of")


def said_perplexity(capsys, folder):
    capsys.readouterr()
    tasks.evaluate.body(None, folder, windows=4)
    return float(capsys.readouterr().out.split()[1])


@pytest.mark.parametrize(
    ("method", "setting"),
    [("svd-llm", []), ("svd-llm", ["variant=W+U", "allocation=loss"]), ("svd-llm", ["order=compressed"]), ("svd", []),
     ("fwsvd", []), ("asvd", ["alpha=0.4"])],
)  # fmt: skip
def test_low_rank_from_the_command_line_to_a_stock_folder(tmp_path, capsys, method, setting):
    import transformers

    out, merged = str(tmp_path / "small"), str(tmp_path / "merged")
    # In float32, because the product of factors in bfloat16 is rounded once more.
    tasks.compress.body(None, "wiki-a-llama", out, method, ratio=0.2, samples=16, length=64, set=setting, dtype="float32")
    model, _ = load(out)
    dense, _ = load("wiki-a-llama")
    matrices = sum(p.numel() for p in Anatomy(dense).blocks.parameters() if p.ndim == 2)
    ranked = sum(p.numel() for p in Anatomy(model).blocks.parameters() if p.ndim == 2)
    assert 0.19 < 1 - ranked / matrices < 0.23
    assert model.edits[0]["edit"] == "low-rank"
    capsys.readouterr()
    tasks.generate.body(None, out, "The history of", tokens=5)
    assert capsys.readouterr().out.startswith("The history of")
    tasks.merge_to_dense.body(None, out, merged)
    assert said_perplexity(capsys, merged) == pytest.approx(said_perplexity(capsys, out), rel=1e-4)
    ids = torch.arange(1, 401).view(4, 100)
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(plain(ids).logits, model(ids).logits) < 1e-4
        assert relative(plain(ids).logits, dense(ids).logits) > 1e-2
    assert plain.num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize(("ratio", "setting"), [(0.5, ["pattern=2:4"]), (0.3, [])])
def test_pruning_from_the_command_line(tmp_path, method, ratio, setting):
    import transformers

    out = tmp_path / "sparse"
    tasks.compress.body(None, "wiki-a-llama", str(out), method, ratio=ratio, samples=16, length=64, set=setting)
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, weight in plain.model.layers.named_parameters():
        if weight.ndim == 2:
            assert (weight == 0).float().mean().item() == pytest.approx(ratio, abs=0.01), name
            if setting:
                assert ((weight.view(-1, 4) != 0).sum(1) <= 2).all()


def test_merging_says_what_it_needs(tmp_path):
    with pytest.raises(Exit, match="no two-factor layers") as stop:
        tasks.merge_to_dense.body(None, "wiki-a-llama", str(tmp_path / "m"))
    assert stop.value.code == 2
    with pytest.raises(ValueError, match="matrices are low-rank.*merge-to-dense"):
        export(WAYS["svd-llm"](tiny("llama")), None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "wiki-b"}, "wiki-b"),
        ({"method": "magic"}, "choose one of slicegpt, slicegpt-stock, slicegpt-global, svd-llm"),
        ({"ratio": 1.0}, r"\[0, 1\)"),
        ({"corpus": "nope"}, "choose one of wiki-a"),
        ({"length": 4096}, "positions"),
        ({"dtype": "int3"}, "float32, bfloat16"),
        ({"device": "cuda:7"}, "no GPU"),
        ({"samples": 10**6}, "fewer or shorter"),
        ({"set": ["layot=tied"]}, "choose one of round_interval, layout"),
        ({"set": ["layout=tide"]}, "low-rank, dense, tied"),
        ({"set": ["layout"]}, "NAME=VALUE"),
        ({"set": ["schedule=/no/such/folder"]}, "holds no sliced model"),
        ({"method": "slicegpt-global", "set": ["layout=tied"]}, "choose one of round_interval"),
        ({"method": "svd-llm", "set": ["variant=V"]}, "choose one of W, W"),
        ({"method": "svd-llm", "set": ["rank=3"]}, "choose one of variant, order, allocation"),
        ({"method": "svd", "ratio": 0.999}, "no rank"),
        ({"method": "wanda", "set": ["pattern=2:4"]}, "removes 0.5 of the weights, not 0.25"),
        ({"method": "sparsegpt", "ratio": 0.5, "set": ["pattern=half"]}, "pattern must be like 2:4"),
        ({"method": "sparsegpt", "ratio": 0.4, "set": ["pattern=3:5"]}, "not divisible by 5"),
    ],
)
def test_bad_commands_write_nothing(tmp_path, arguments, message):
    if arguments.get("device") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = {"model": "wiki-a-llama", "out": str(tmp_path / "out")} | arguments
    with pytest.raises(Exit, match=message) as stop:
        tasks.compress.body(None, **arguments)
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_long_sequences_are_refused_before_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.compress.sample_blocks", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match="4096 tokens, but the model has 256 positions"):
        compress("wiki-a-llama", tmp_path / "out", calibration=Calibration("wiki-a", 2, 4096))


def test_existing_output_is_refused_before_any_work(tmp_path):
    with pytest.raises(FileExistsError, match="choose another"):
        compress("no-such-model", tmp_path)
    with pytest.raises(Exit, match="record of edits|not complete|compression|no config"):
        tasks.evaluate.body(None, str(tmp_path))


def test_default_calibration_fits_the_model(tmp_path):
    row = compress("wiki-a-opt", tmp_path / "m", calibration=Calibration("wiki-a", 4, 32), round_interval=1)
    assert row["removed_decoder"] > 0
    assert row["params"] < 10**7


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_families_that_cannot_be_sliced_write_nothing(tmp_path, family):
    import transformers

    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=2))
    else:
        model = tiny(family, torch.float32, vocab_size=2048)
    model.save_pretrained(tmp_path / "model")
    load("wiki-a-llama")[1].save_pretrained(tmp_path / "model")
    with pytest.raises(Exit, match="sandwich|Supported are") as stop:
        tasks.compress.body(None, str(tmp_path / "model"), str(tmp_path / "out"), samples=2, length=16)
    assert stop.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def truncate_weights(folder):
    path = folder / "compressed.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def change_record(edit=None, **changes):
    def change(folder):
        record = json.loads((folder / "compression.json").read_text())
        record["edits"][0] |= edit or {}
        (folder / "compression.json").write_text(json.dumps(record | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no folder"),
        (change_record(schema=7), "schema 7"),
        (change_record(edit={"layout": "magic"}), "cannot be repeated"),
        (truncate_weights, "missing or damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "token"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_damaged_folders_end_every_command_cleanly(tmp_path, command, damage, message):
    model, tokenizer = load("wiki-a-opt")
    folder = save(slice_model(model, torch.arange(1, 65).view(4, 16), 0.25), tokenizer, tmp_path / "small")
    damage(folder)
    with pytest.raises(Exit, match=message) as stop:
        getattr(tasks, command).body(None, str(folder), *(["The"] if command == "generate" else []))
    assert stop.value.code == 2
