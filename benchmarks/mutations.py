"""Change the files of model folders at random, read each folder in every way, and count what became of it.

    python -m benchmarks.mutations [--cases 2000] [--damages 400] [--seed 0] [--jobs 2]

A case is one change in one file of a tiny random model, dense or compressed: a value, a key or a tensor in its JSON (a
mutation), or cut and changed bytes (a damage). The folder is read into memory and block by block from disk, and exported as GGUF.
It must be refused with one sentence, or be the same function as before. Another function is right only where the changed value is
said nowhere else in the folder (`SAID`). Every batch runs in a process of its own with little memory, and every case has seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import gguf
import torch

from lib.models.checkpoint import export, is_checkpoint, save
from lib.models.disk import model_on_disk
from lib.models.gguf_export import to_gguf
from lib.models.load import load
from lib.papers.slicegpt import slice_model
from lib.papers.svd_llm import compress_model
from lib.primitives.structured import remove_groups, remove_neurons
from tests.conftest import CONFIGS, tiny, token_ids

MEMORY, SECONDS, BATCH = 3 * 2**29, 15, 40  # of a batch beyond what is there at its start; of a case; cases in a batch
REFUSALS = (ValueError, FileNotFoundError, OSError)
TEXT = "The history of naïve café"
BOTH_WAYS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # families whose GGUF files are read here, too, whatever the size of their heads

# Keys of config.json whose values no other file of a folder says and no shape of a tensor shows: the file says so.
SAID = {
    "the class of the model, where another one has the same tensors": {"model_type"},
    "activation": {"hidden_act", "hidden_activation", "activation_function"},
    "constants": {"rms_norm_eps", "layer_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"},
    "rotation": {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rope_local_base_freq"},
    "attention": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"},
    "order of the block": {"do_layer_norm_before", "use_parallel_residual"},
    "heads, where their size follows from their number": {"num_attention_heads", "num_key_value_heads"},
    "special tokens": {"pad_token_id"},
}
SAID_KEYS = set().union(*SAID.values())
# Files that alone say how text becomes tokens and how a text ends: their values never change logits.
ALONE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Keys that a configuration may lack, with values that would mean something.
ADDED = {
    "attention_bias": True, "tie_word_embeddings": True, "sliding_window": 3, "num_key_value_heads": 1, "head_dim": 8,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "quantization_config": {"quant_method": "gptq", "bits": 4},
    "text_config": {}, "auto_map": {"AutoConfig": "code.C"}, "mlp_bias": True, "layer_types": ["full_attention"], "junk": [None],
    "dtype": "float16", "torch_dtype": 7, "vocab_size": 10**12, "is_decoder": "yes", "pruned_heads": {"0": [1]},
}  # fmt: skip


class TooLong(BaseException):
    """A case had its seconds; no Exception, so that no reader takes it for a damaged file."""


@dataclass
class Subject:
    """A model folder before any change: its name, place, and what it answers (or nothing yet)."""

    name: str
    folder: Path
    answers: dict | None = None


# --- the models ---------------------------------------------------------------------------------------------------------


def subjects(place: Path) -> list[Subject]:
    """Folders of every family, one of several files, and compressed folders of every kind of edit."""
    _, tokenizer = load("wiki-a-llama")
    models = {family: tiny(family, torch.float32, vocab_size=2048) for family in CONFIGS}
    for name, model in models.items():
        export(model, tokenizer, place / name)
    models["qwen2"].save_pretrained(place / "qwen2 in shards", max_shard_size="100KB")
    tokenizer.save_pretrained(place / "qwen2 in shards")
    uneven = [torch.arange(k) for k in (40, 48, 31)]
    fewer = remove_groups(remove_neurons(models["mistral"], uneven), [torch.arange(k) for k in (1, 2, 2)])
    small = {
        "slicegpt": slice_model(models["llama"], token_ids(), 0.25, layout="low-rank"),
        "slicegpt, tied": slice_model(tiny("opt", torch.float32, vocab_size=2048), token_ids(), 0.25, layout="tied"),
        "svd-llm": compress_model(models["qwen3"], token_ids(), 0.4),
        "unequal blocks": fewer,
    }
    for name, model in small.items():
        save(model, tokenizer, place / name, base="tiny")
    found = [Subject(path.name, path) for path in sorted(place.iterdir())]
    for subject in found:
        subject.answers = answers(*load(str(subject.folder)))
    return found


@torch.no_grad()
def answers(model, tokenizer) -> dict:
    """What a model says: logits, the tokens of a text, and how a text ends."""
    said = {name: value for name, value in model.generation_config.to_dict().items() if name != "transformers_version"}
    return {"logits": model(token_ids()).logits, "tokens": tokenizer(TEXT).input_ids, "generation": said}


@torch.no_grad()
def logits_on_disk(folder: Path) -> torch.Tensor:
    model = model_on_disk(folder, torch.float32)
    model.stored.load(model)
    model.tie_weights()
    return model(token_ids()).logits


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), two.nan_to_num())


# --- changes ------------------------------------------------------------------------------------------------------------


def places_in(value, prefix: tuple = ()) -> list[tuple]:
    """Every place in a JSON value except the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*prefix, key), *places_in(inner, (*prefix, key)))]


def another(value, chance: random.Random):
    """A value that may stand in the place of another one, more often a plausible than an absurd one."""
    absurd = [None, True, False, -1, 0, 10**12, 2**63, 1e308, math.nan, "", "12", "gelu", [], {}, [value], {"a": [1, {"b": 2}]}]
    if isinstance(value, bool):
        return chance.choice([not value, not value, str(value), *absurd])
    if isinstance(value, (int, float)):
        near = [value + 1, value * 2, value / 2, value - 1, -value, str(value), value * 10**9, float(value), int(value // 2)]
        return chance.choice(near + chance.sample(absurd, 4))
    if isinstance(value, str):
        return chance.choice([value + "x", value[:-1], value.upper(), "sdpa", *chance.sample(absurd, 3)])
    if isinstance(value, list) and value:
        return chance.choice([value[:-1], value[1:], value + value[:1], value[::-1], *chance.sample(absurd, 2)])
    return chance.choice(absurd)


def change_json(said: dict, chance: random.Random) -> str:
    """Change, remove or add one value, in place; returns the keys of the place."""
    place = chance.choice(places_in(said))
    inner = said
    for key in place[:-1]:
        inner = inner[key]
    kind = chance.choice(["change"] * 6 + ["remove", "add", "swap"])
    if kind == "remove":
        del inner[place[-1]]
    elif kind == "add":
        key = chance.choice(list(ADDED))
        said[key], place = copy.deepcopy(ADDED[key]), (key,)
    elif kind == "swap" and isinstance(inner, dict):
        other = chance.choice(list(inner))
        inner[place[-1]], inner[other] = inner[other], inner[place[-1]]
        place = (*place, other)
    else:
        inner[place[-1]] = another(inner[place[-1]], chance)
    return f"{kind} {'/'.join(map(str, place))}"


def mutate_json(file: Path, chance: random.Random) -> str:
    said = json.loads(file.read_text())
    what = change_json(said, chance)
    replace(file, json.dumps(said).encode())
    return what


def mutate_header(file: Path, chance: random.Random) -> str:
    """Change what a safetensors file says of its tensors; the bytes behind stay."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    one, two = chance.choice(names), chance.choice(names)
    kind = chance.choice(["names", "shape", "data_offsets", "dtype", "turned", "any"])
    if kind == "names":
        header[one], header[two] = header[two], header[one]
    elif kind == "turned":
        header[one]["shape"].reverse()
    elif kind == "any":
        change_json(header, chance)
    else:
        header[one][kind], header[two][kind] = header[two][kind], header[one][kind]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    replace(file, len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"header: {kind} of {one}, {two}"


def damage(file: Path, chance: random.Random) -> str:
    """Cut a file at a random byte, or change some bytes."""
    data = bytearray(file.read_bytes())
    if chance.random() < 0.3:
        kept = chance.randrange(len(data))
        replace(file, bytes(data[:kept]))
        return f"cut to {kept} of {len(data)} bytes"
    start = min(len(data), 8 + int.from_bytes(data[:8], "little")) if file.suffix == ".safetensors" else len(data)
    places = [chance.randrange(start if chance.random() < 0.7 else len(data)) for _ in range(chance.choice([1, 1, 2, 5]))]
    for place in places:
        data[place] = chance.choice([data[place] ^ 1 << chance.randrange(8), chance.randrange(256), *b"0123456789"])
    replace(file, bytes(data))
    return f"bytes {places}" + (" of weights" if min(places) >= start else "")


def replace(file: Path, data: bytes) -> None:
    """Write a file anew: it was a second name of the subject's own."""
    file.unlink()
    file.write_bytes(data)


# --- verdicts -----------------------------------------------------------------------------------------------------------


def verdict(subject: Subject, folder: Path, file: str, chance: random.Random) -> str:
    """What became of a changed folder: refused, the same, the file says so, or WRONG with the reason."""
    loaded = attempt(lambda: answers(*load(str(folder))))
    failed = isinstance(loaded, Exception)
    found = (complaint(loaded) or "refused") if failed else of_answers(subject, folder, file, loaded)
    if not found.startswith("WRONG") and not is_checkpoint(folder) and not is_checkpoint(subject.folder):
        found = on_disk(folder, file, loaded) or found
    if not found.startswith("WRONG") and subject.name.split()[0] in BOTH_WAYS:
        found = as_gguf(folder, file, loaded, chance) or found
    return found


def attempt(read) -> object:
    """What `read` returns, or the exception that it raises."""
    try:
        return read()
    except Exception as error:
        return error


def complaint(error: Exception) -> str | None:
    """What is wrong with a refusal, or None."""
    text = str(error)
    if not isinstance(error, REFUSALS):
        return f"WRONG: {type(error).__name__}: {text[:300]}"
    if "\n" in text.strip() or len(text) > 1000 or not text.strip():
        return f"WRONG: not one sentence: {text[:300]!r}"
    if re.search("allocate|out of memory", text):
        return f"WRONG: refused only for want of memory: {text[:300]}"
    return None


def changed_keys(before, after, prefix: str = "") -> set[str]:
    """Keys of a JSON object, at any depth, whose values differ, with all keys above them."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return set() if before == after and type(before) is type(after) else {prefix}
    below = {key: changed_keys(before.get(key), after.get(key), key) for key in before.keys() | after.keys()}
    return set().union(*(found | {key} for key, found in below.items() if found))


def of_answers(subject: Subject, folder: Path, file: str, loaded: dict) -> str:
    """The verdict on a folder that loads."""
    expected = subject.answers
    moved = [name for name in ("tokens", "generation") if loaded[name] != expected[name]]
    if not same(loaded["logits"], expected["logits"]):
        moved.append("logits")
    if not moved:
        return "the same function"
    if file in ALONE and "logits" not in moved:
        return "another function, as the file says"
    if file == "config.json":
        keys = changed_keys(*(json.loads((place / file).read_text()) for place in (subject.folder, folder)))
        if keys & SAID_KEYS:
            return "another function, as the file says"
        return f"WRONG: other {', '.join(moved)} by {sorted(keys)}"
    if file.endswith(".safetensors") and moved == ["logits"]:
        return "another function, as the file says" if only_bytes_or_names(subject, folder, file) else "WRONG: other logits"
    return f"WRONG: other {', '.join(moved)}"


def only_bytes_or_names(subject: Subject, folder: Path, file: str) -> bool:
    """Whether two safetensors files have the same shapes under the same names, so that names and bytes alone tell them apart."""
    shapes = []
    for place in (subject.folder, folder):
        with (place / file).open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        header.pop("__metadata__", None)
        shapes.append({name: (facts["dtype"], facts["shape"]) for name, facts in header.items()})
    return shapes[0] == shapes[1]


def on_disk(folder: Path, file: str, loaded: object) -> str | None:
    """What is wrong with reading a dense folder block by block, or None: it must agree with reading it into memory."""
    found = attempt(lambda: logits_on_disk(folder))
    if isinstance(found, Exception):
        if isinstance(loaded, dict) and not re.search("NaN|is not known here|family record", str(found)):
            return f"WRONG: loads in memory, but not from disk: {found}"
        return complaint(found)
    if isinstance(loaded, Exception):
        return None if file in ALONE else f"WRONG: loads from disk, but not in memory: {loaded}"
    return None if same(found, loaded["logits"]) else "WRONG: another function from disk than in memory"


def as_gguf(folder: Path, file: str, loaded: object, chance: random.Random) -> str | None:
    """What is wrong with the export of a folder, or None: it must be refused, or read back as the same function."""
    out = folder.parent / "out.gguf"
    found = attempt(lambda: to_gguf(folder, out, "float32"))
    try:
        left = sorted(path.name for path in folder.parent.iterdir() if "gguf" in path.name)
        if isinstance(found, Exception):
            return f"WRONG: export left {left}" if left else complaint(found)
        if isinstance(loaded, Exception):
            return f"WRONG: exported, but not loaded: {loaded}"
        if left != ["out.gguf"]:
            return f"WRONG: export left {left}"
        if chance.random() < 0.3:
            return read_back(out, loaded)
    finally:
        out.unlink(missing_ok=True)
    return None


@torch.no_grad()
def read_back(file: Path, loaded: dict) -> str | None:
    again = attempt(lambda: load(str(file))[0])
    if isinstance(again, Exception):
        return f"WRONG: exported, but not read back: {again}"
    length = min(again.config.max_position_embeddings, token_ids().shape[1])
    found, wanted = again(token_ids()[:, :length]).logits.nan_to_num(), loaded["logits"][:, :length].nan_to_num()
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return None if error < 1e-3 else f"WRONG: read back as another function, {error:.1e} off"


# --- GGUF files ---------------------------------------------------------------------------------------------------------


def list_of_tensors(file: Path) -> range:
    """Where a GGUF file says names, shapes, types and offsets of its tensors."""
    reader = gguf.GGUFReader(file)
    return range(min(tensor.field.offset for tensor in reader.tensors), reader.data_offset)


def gguf_verdict(original: Path, changed: Path, wanted: dict) -> str:
    """What became of a changed GGUF file. Its keys and its weights are said nowhere else, but tensors have one place each."""
    loaded = attempt(lambda: answers(*load(str(changed))))
    if isinstance(loaded, Exception):
        return complaint(loaded) or "refused"
    if same(loaded["logits"], wanted["logits"]) and all(loaded[name] == wanted[name] for name in ("tokens", "generation")):
        return "the same function"
    data, before = changed.read_bytes(), original.read_bytes()
    wrong = [place for place in list_of_tensors(original) if data[place] != before[place]]
    return f"WRONG: the list of tensors differs at {wrong[:3]}" if wrong else "another function, as the file says"


def gguf_case(original: Path, wanted: dict, place: Path, chance: random.Random) -> tuple[str, str]:
    """One damage of a GGUF file, half of the bytes in the list of its tensors; what was done and the verdict."""
    changed = place / "changed" / "model.gguf"
    changed.parent.mkdir(exist_ok=True)
    shutil.copy(original, changed)
    if chance.random() < 0.5:
        data = bytearray(original.read_bytes())
        at = chance.choice(list_of_tensors(original))
        data[at] ^= 1 << chance.randrange(8)
        replace(changed, bytes(data))
        what = f"byte {at} of the list of tensors"
    else:
        what = damage(changed, chance)
    return what, gguf_verdict(original, changed, wanted)


# --- the campaign -------------------------------------------------------------------------------------------------------


def one_case(subject: Subject, kind: str, place: Path, chance: random.Random) -> tuple[str, str]:
    """Change one file of a copy of a subject; what was done and the verdict."""
    if subject.folder.suffix == ".gguf":
        return gguf_case(subject.folder, subject.answers, place, chance)
    folder = place / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(subject.folder, folder, copy_function=os.link)
    files = sorted(path.name for path in folder.iterdir())
    if kind == "mutation":
        files = [name for name in files if not name.startswith("tokenizer")]
        files += ["config.json"] * 4 + ["compression.json"] * 4 * is_checkpoint(folder)
        file = chance.choice(files)
        change = mutate_header if file.endswith(".safetensors") else mutate_json
    else:
        file, change = chance.choice(files), damage
    what = f"{file}: {change(folder / file, chance)}"
    return what, verdict(subject, folder, file, chance)


def batch(cases: list[tuple], report: Path, place: Path) -> None:
    """Run cases one after the other in this process, with little memory, and note each before and after it."""
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").is_file() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    signal.signal(signal.SIGALRM, too_long)
    quiet = open(os.devnull, "w")  # noqa: SIM115 (for the rest of this process)
    os.dup2(quiet.fileno(), 1)
    os.dup2(quiet.fileno(), 2)
    with report.open("a") as notes:
        for number, subject, kind, seed in cases:
            print(json.dumps([number]), file=notes, flush=True)
            signal.alarm(SECONDS)
            try:
                what, found = one_case(subject, kind, place, random.Random(seed))
            except TooLong:
                what, found = f"seed {seed}", f"WRONG: more than {SECONDS} seconds"
            signal.alarm(0)
            shutil.rmtree(place / "cache", ignore_errors=True)
            print(json.dumps([number, what, found]), file=notes, flush=True)


def too_long(*_) -> None:
    raise TooLong


def guarded(cases: list[tuple]) -> list[tuple]:
    """Every case with what was done and its verdict; one that ends its process is wrong, and the others go on in a new one."""
    done, context = [], get_context("fork")
    while cases:
        with tempfile.TemporaryDirectory() as place:
            report = Path(place) / "report"
            report.touch()
            process = context.Process(target=batch, args=(cases, report, Path(place)))
            process.start()
            process.join()
            notes = [json.loads(line) for line in report.read_text().splitlines()]
        ended = {note[0]: note for note in notes if len(note) == 3}
        died = [note[0] for note in notes if note[0] not in ended]
        for number, subject, kind, seed in cases:
            if number in ended:
                done.append((kind, subject.name, *ended[number][1:]))
            elif number in died or not notes:
                done.append((kind, subject.name, f"seed {seed}", f"WRONG: the process ended with {process.exitcode}"))
        cases = [case for case in cases if case[0] not in ended and case[0] not in died] if notes else []
    return done


def campaign(cases: int, damages: int, seed: int, jobs: int) -> list[str]:
    """Run all cases, print their counts, and return what is wrong."""
    with tempfile.TemporaryDirectory() as place:
        found = subjects(Path(place))
        file = Path(place) / "llama.gguf"
        to_gguf(Path(place) / "llama", file, "float32")
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        files = [Subject("GGUF file", file, answers(*load(str(file))))]
        kinds = ["mutation"] * cases + ["damage"] * damages
        plan = [
            (i, (found + files * (kind == "damage"))[i % (len(found) + (kind == "damage"))], kind, f"{seed} {i}")
            for i, kind in enumerate(kinds)
        ]
        random.Random(seed).shuffle(plan)
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            parts = [plan[start : start + BATCH] for start in range(0, len(plan), BATCH)]
            done = []
            for part in pool.map(guarded, parts):
                done += part
                print("".join(f"{line}\n" for line in wrong_of(part)), end="", flush=True)
    return report_of(done)


def report_of(done: list[tuple]) -> list[str]:
    for kind in ("mutation", "damage"):
        counts = Counter(found.partition(":")[0] for what, _, _, found in done if what == kind)
        print(f"{counts.total()} files with a {kind}: " + ", ".join(f"{n} {found}" for found, n in counts.most_common()))
    print("values that only their file says: " + "; ".join(f"{why} ({', '.join(sorted(k))})" for why, k in SAID.items()))
    return wrong_of(done)


def wrong_of(done: list[tuple]) -> list[str]:
    return [f"{kind}, {name}, {what}: {found}" for kind, name, what, found in done if found.startswith("WRONG")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="mutated folders")
    parser.add_argument("--damages", type=int, default=400, help="folders and GGUF files with cut or changed bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    begun = time.time()
    wrong = campaign(given.cases, given.damages, given.seed, given.jobs)
    print(f"{len(wrong)} wrong; {time.time() - begun:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
