"""From disk as in memory: equal results, one block at a time, and a killed run goes on behind its last finished block."""

import gc
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lib.baselines import sparsegpt, wanda
from lib.compress import compress
from lib.evaluation.text import Calibration
from lib.methods import on_disk_method, settings_of
from lib.models import disk
from lib.models.checkpoint import fingerprint, is_checkpoint, load_checkpoint
from lib.models.disk import compress_on_disk, model_on_disk, write_tensors
from lib.models.load import load
from lib.papers import comp, svd_llm
from lib.primitives.anatomy import Anatomy
from tests.conftest import tiny, token_ids

IDS = token_ids()
STRICT = dict(variance_bound=1e-4, rounds=3)  # the multipliers of random blocks vary more: rounds are needed
# Name -> (method, ratio, settings from disk, the same in memory)
RUNS = {
    "sparsegpt": ("sparsegpt", 0.5, {}, lambda m: sparsegpt.prune(m, IDS, 0.5)),
    "sparsegpt 2:4": ("sparsegpt", 0.5, {"pattern": "2:4"}, lambda m: sparsegpt.prune(m, IDS, (2, 4))),
    "wanda": ("wanda", 0.5, {}, lambda m: wanda.prune(m, IDS, 0.5)),
    "svd original": ("svd-llm", 0.2, {}, lambda m: svd_llm.compress_model(m, IDS, 0.2)),
    "svd compressed": (
        "svd-llm", 0.2, {"order": "compressed"}, lambda m: svd_llm.compress_model(m, IDS, 0.2, order="compressed"),
    ),
    "comp": ("comp", 0.3, {"rho": 0.7}, lambda m: comp.prune(m, IDS, 0.3, comp.Settings(rho=0.7))[0]),
    "comp, rounds": ("comp", 0.2, {"rho": 0.0} | STRICT, lambda m: comp.prune(m, IDS, 0.2, comp.Settings(rho=0.0, **STRICT))[0]),
    "comp, one stream": (
        "comp", 0.2, {"reference": "same input"}, lambda m: comp.prune(m, IDS, 0.2, comp.Settings(reference="same input"))[0],
    ),
    "comp, blocks only": ("comp", 0.4, {"rho": 1.0}, lambda m: comp.prune(m, IDS, 0.4, comp.Settings(rho=1.0))[0]),
}  # fmt: skip
LAYERS = 5


def on_disk(folder, family="llama", layers=LAYERS, dtype=torch.float32, shard="40KB", **settings):
    """A tiny model, saved in shards as the hub has them."""
    model = tiny(family, dtype, num_hidden_layers=layers, **settings)
    model.save_pretrained(folder / "dense", max_shard_size=shard)
    return model, folder / "dense"


def from_disk(source, out, method="comp", ratio=0.2, ids=IDS, dtype=None, resume=False, progress=None, **settings):
    """`compress_on_disk` by the name of a method, as `lib.compress` calls it."""
    record, chosen = on_disk_method(method), settings_of(method, settings)
    run = {"method": method, "ratio": ratio, "settings": asdict(chosen)} if resume else None
    return compress_on_disk(
        source, out, ids, lambda model, ids, note: record.on_disk(model, ids, ratio, chosen, note),
        dtype=dtype, resume=run, progress=progress,
    )  # fmt: skip


def loaded(folder):
    return load_checkpoint(folder) if is_checkpoint(folder) else AutoModelForCausalLM.from_pretrained(folder).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- equal results ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:tuned multipliers")
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("run", RUNS)
def test_from_disk_as_in_memory(tmp_path, run, family):
    method, ratio, settings, in_memory = RUNS[run]
    model, source = on_disk(tmp_path, family, tie_word_embeddings=family != "qwen3")
    small = from_disk(source, tmp_path / "small", method, ratio, **settings)
    assert all(p.is_meta for p in small.parameters())
    expected, found = in_memory(model), loaded(tmp_path / "small")
    assert same(found, expected)
    assert getattr(found, "edits", []) == getattr(expected, "edits", [])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)


def test_rounds_really_happen(tmp_path):
    model, _ = on_disk(tmp_path)
    assert comp.prune(model, IDS, 0.2, comp.Settings(rho=0.0, **STRICT))[1].rounds > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_work(tmp_path, dtype):
    _, source = on_disk(tmp_path, dtype=torch.bfloat16)
    from_disk(source, tmp_path / "small", "wanda", 0.5, dtype=dtype)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert found.dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    assert same(found, wanda.prune(model, IDS, 0.5))


def test_one_file_and_names_without_the_models_prefix(tmp_path):
    model, source = on_disk(tmp_path, "opt", shard="1GB")
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "bare")
    write = {name.removeprefix("model."): value for name, value in tensors.items()}
    write_tensors(tmp_path / "bare" / "model.safetensors", write, write.values())
    expected = wanda.prune(model, IDS, 0.5)
    for name in ("dense", "bare"):
        from_disk(tmp_path / name, tmp_path / f"small {name}", "wanda", 0.5)
        assert same(loaded(tmp_path / f"small {name}"), expected)


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.randn(0, 4)}
    write_tensors(tmp_path / "t", tensors, tensors.values())
    found = load_file(tmp_path / "t")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    with pytest.raises(ValueError, match="expected b"):
        write_tensors(tmp_path / "u", {"b": torch.ones(3)}, [torch.ones(2)])


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprint_is_that_of_the_model_in_memory(tmp_path, tied):
    model, source = on_disk(tmp_path, tie_word_embeddings=tied)
    assert disk.fingerprint_on_disk(model_on_disk(source)) == fingerprint(model)


@pytest.mark.parametrize("method", ["comp", "wanda"])
def test_compress_streamed(tmp_path, method):
    draw = Calibration("wiki-a", 4, 32)
    rows = [compress("wiki-a-llama", tmp_path / name, method, 0.3, draw, streamed=name == "disk") for name in ("disk", "memory")]
    assert rows[0] == rows[1]
    (disk, tokenizer), (memory, _) = (load(str(tmp_path / name)) for name in ("disk", "memory"))
    assert same(disk, memory)
    assert tokenizer("A").input_ids
    if method == "comp":
        records = [json.loads((tmp_path / name / "compression.json").read_text()) for name in ("disk", "memory")]
        assert records[0]["provenance"] == records[1]["provenance"]
        assert records[0]["edits"] == records[1]["edits"]


def test_refused_settings_leave_nothing_that_stops_the_corrected_run(tmp_path):
    _, source = on_disk(tmp_path)
    with pytest.raises(ValueError, match="uniform allocation"):
        from_disk(source, tmp_path / "small", "svd-llm", resume=True, allocation="loss")
    from_disk(source, tmp_path / "small", "svd-llm", resume=True)


def test_inputs_that_span_too_little_are_reported(tmp_path):
    _, source = on_disk(tmp_path)
    said = []
    from_disk(source, tmp_path / "small", "svd-llm", ids=IDS[:1, :8], progress=said.append)
    assert any("do not span its channels" in line for line in said)


# --- memory ----------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at what is in memory each time that a tensor has been read, a block been edited, or finished."""

    def __init__(self, monkeypatch):
        self.blocks, self.bytes, self.between = set(), [], []
        original = disk.read

        def read(place):
            self.blocks.add(frozenset(held.name.split(".")[2] for held, _ in disk._LOADED if ".layers." in held.name))
            return original(place)

        monkeypatch.setattr(disk, "read", read)
        write = disk.write_tensors

        def watched_write(*arguments):
            self.bytes.append(self.parameters())
            write(*arguments)

        monkeypatch.setattr(disk, "write_tensors", watched_write)

    def parameters(self):
        """Bytes of all parameters that were made since `gc.freeze`."""
        return sum(p.nbytes for p in gc.get_objects() if isinstance(p, nn.Parameter) and not p.is_meta)

    def finished(self, line):
        if "on disk" in line:
            self.between.append(self.parameters())


@pytest.mark.parametrize("run", ["sparsegpt", "svd original", "svd compressed", "comp", "comp, one stream"])
def test_one_block_is_in_memory(tmp_path, monkeypatch, run):
    method, ratio, settings, _ = RUNS[run]
    peaks = []
    for layers in (4, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        model, source = on_disk(folder, layers=layers)
        block = sum(p.nbytes for p in Anatomy(model).blocks[0].parameters())
        gc.collect()
        gc.freeze()  # so that only what follows is looked through
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            from_disk(source, folder / "small", method, ratio, progress=watch.finished, **settings)
        assert max(map(len, watch.blocks)) == 1  # tensors of one block, also where a teacher runs
        gc.unfreeze()
        assert set(watch.between) == {0}  # nothing between two blocks
        peaks.append(max(watch.bytes))
        assert peaks[-1] < 2 * block  # what was read, beside what it became
    assert peaks[0] == pytest.approx(peaks[1], rel=0.25)  # at three times the depth; COMP's blocks are not equally wide


def test_no_gradients_are_asked_for(tmp_path):
    _, source = on_disk(tmp_path)
    model = model_on_disk(source)
    block = Anatomy(model).blocks[0]
    with disk.resident(block):
        assert not any(p.requires_grad or p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in block.parameters())


# --- interruptions ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.filterwarnings("ignore:tuned multipliers")
@pytest.mark.parametrize("at", ["middle of a block", "half-written file", "before the state"])
@pytest.mark.parametrize("run", ["sparsegpt", "svd original", "svd compressed", "comp", "comp, rounds"])
def test_a_killed_run_goes_on_behind_the_last_finished_block(tmp_path, monkeypatch, run, at):
    method, ratio, settings, _ = RUNS[run]
    _, source = on_disk(tmp_path)
    from_disk(source, tmp_path / "whole", method, ratio, **settings)
    total = len(loaded(tmp_path / "whole").model.layers)
    lines = []
    for kill in (0, total - 1, total + 1):  # the last: in the second round, where there is one
        seen = [0]
        name = {"middle of a block": "empty", "half-written file": "write_tensors", "before the state": "_save_state"}[at]
        original = getattr(disk, name)

        def once(*arguments, name=name, original=original, seen=seen, kill=kill):
            if name == "write_tensors" and not str(arguments[0]).endswith("block.tmp"):
                return original(*arguments)
            seen[0] += 1
            if seen[0] == kill + 1:
                if name == "write_tensors":
                    arguments[0].write_bytes(b"half")
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(disk, name, once)
            try:
                from_disk(source, tmp_path / "small", method, ratio, resume=True, **settings)
            except Killed:
                assert not (tmp_path / "small").exists()
        if not (tmp_path / "small").exists():
            lines.clear()
            from_disk(source, tmp_path / "small", method, ratio, resume=True, progress=lines.append, **settings)
            if at == "before the state" and 0 < kill < total:  # one block again, and no more before it
                assert next(line for line in lines if "on disk" in line) == f"block {kill + 1} of {total} on disk"
        assert files(tmp_path / "small") == files(tmp_path / "whole")
        shutil.rmtree(tmp_path / "small")


def test_other_arguments_do_not_go_on(tmp_path, monkeypatch):
    _, source = on_disk(tmp_path)

    def stop(line):
        raise Killed

    with pytest.raises(Killed):
        from_disk(source, tmp_path / "small", "wanda", 0.5, resume=True, progress=stop)
    before = files(tmp_path / ".small.partial")
    for change, named in (
        (dict(ids=token_ids(seed=5)), "tokens"), (dict(ratio=0.4), "ratio"), (dict(method="sparsegpt"), "method"),
        (dict(pattern="2:4"), "settings"), (dict(dtype=torch.float64), "dtype"),
    ):  # fmt: skip
        arguments = dict(ids=IDS, method="wanda", ratio=0.5) | change
        with pytest.raises(ValueError, match=f"unfinished run with other {named}: remove it"):
            from_disk(source, tmp_path / "small", **arguments, resume=True)
    assert files(tmp_path / ".small.partial") == before


def test_without_resume_nothing_is_left_behind(tmp_path):
    _, source = on_disk(tmp_path)

    def stop(line):
        raise Killed

    with pytest.raises(Killed):
        from_disk(source, tmp_path / "small", "wanda", 0.5, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_mistakes_fail_before_any_work(tmp_path):
    _, source = on_disk(tmp_path)
    out = tmp_path / "small"
    for arguments, message in (
        (dict(method="slicegpt"), "does not run from disk: choose one of svd-llm, sparsegpt, wanda, comp"),
        (dict(method="svd-llm", order="sideways"), "unknown order"),
        (dict(method="svd-llm", variant="U"), "variant W"),
        (dict(method="sparsegpt", ratio=1.5), "sparsity must be"),
        (dict(method="comp", ratio=0.95), "lower the ratio"),
        (dict(method="comp", metric="nope"), "unknown metric"),
        (dict(method="wanda", ids=IDS + 1000), "vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            from_disk(source, out, **dict(ids=IDS, ratio=0.2) | arguments)
    with pytest.raises(FileExistsError, match="exists"):
        from_disk(source, source)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    comp_folder = tmp_path / "once"
    from_disk(source, comp_folder, "comp", 0.2)
    with pytest.raises(ValueError, match="compressed model"):
        from_disk(comp_folder, out)
    with pytest.raises(ValueError, match="local folder"):
        compress("facebook/opt-125m", out, "comp", 0.2, streamed=True)
    with pytest.raises(ValueError, match="does not run from disk"):
        compress(str(source), out, "slicegpt", 0.2, streamed=True)


def test_broken_folders_are_named(tmp_path):
    _, source = on_disk(tmp_path, shard="1GB")
    tensors = {n: t.clone() for n, t in load_file(source / "model.safetensors").items()}  # out of the file that changes
    name = "model.layers.1.mlp.up_proj.weight"

    def attempt(changed):
        write_tensors(source / "model.safetensors", changed, changed.values())
        from_disk(source, tmp_path / "small", "wanda", 0.5)

    with pytest.raises(ValueError, match=f"no tensor {name}"):
        attempt({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=f"{name} in .* is"):
        attempt(tensors | {name: tensors[name][:-1]})
    with pytest.raises(ValueError, match=f"{name} in .* NaN"):
        attempt(tensors | {name: tensors[name] * float("nan")})
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        from_disk(source, tmp_path / "small", "wanda", 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
