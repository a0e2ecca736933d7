"""Prune, or store in four bits? Models of one network as GGUF files, run in llama.cpp on this machine."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lib.evaluation.device import check_installed, file_perplexity, run_files
from lib.evaluation.paired import common_ratio
from lib.models.checkpoint import export, save
from lib.models.gguf_architecture import check_config
from lib.models.gguf_export import to_gguf
from lib.models.load import locate

DTYPES = {"F16": "float16", "Q8_0": "Q8_0", "Q4_0": "Q4_0"}  # kinds of files in tables -> as `to_gguf` calls them
FULL, FOUR = "F16", "Q4_0"
DENSE = "dense"
REACHED = 0.9  # of the decoding speed that the bytes of a file promise


class File(NamedTuple):
    """A model to be written: its method, the share of the decoder that the method removed, and the kind of file."""

    method: str
    size: float
    kind: str
    model: nn.Module


def measured(files: Sequence[File], tokenizer, windows: torch.Tensor, threads: int = 1) -> list[dict]:
    """A row for each file, the first of which is the dense model in 16 bits: what `run_files` says, and `perplexity`.

    windows [number, length]: of ids, on which llama.cpp computes the perplexity. All files take turns, so `writes` and `reads`,
    how many times as fast as the first file one decodes and reads its prompt, are fair. Raises what `to_gguf` and `run_files`
    raise.
    """
    prompt = min(512, files[0].model.config.max_position_embeddings // 2)
    rows = [{"method": file.method, "size": file.size, "kind": file.kind} for file in files]
    with tempfile.TemporaryDirectory() as folder:
        paths = [written(file, tokenizer, Path(folder) / str(i)) for i, file in enumerate(files)]
        for row, path in zip(rows, paths, strict=True):
            row["perplexity"] = file_perplexity(path, windows, threads).record()
        for row, ran in zip(rows, run_files(paths, threads, prompt, prompt // 4), strict=True):
            row |= {name: value for name, value in ran.items() if name != "file"}
    for row in rows:
        row["writes"] = row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
        row["reads"] = rows[0]["first_token_ms"] / row["first_token_ms"]
        row["expected"] = rows[0]["bytes"] / row["bytes"]
    return rows


def written(file: File, tokenizer, folder: Path) -> Path:
    """Write a model as one GGUF file inside the new `folder`."""
    (save if getattr(file.model, "edits", None) else export)(file.model, tokenizer, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rows that stay in 16 bits; the bytes of the file count them
        return to_gguf(folder, folder / "model.gguf", DTYPES[file.kind])


def files_of(model: str, dtypes: Sequence[str], folder: Path) -> list[Path]:
    """The file itself if `model` is one, else files of a model's folder, one for each dtype of `to_gguf`, written into `folder`.

    Raises what `to_gguf` does.
    """
    if model.endswith(".gguf"):
        return [Path(model)]
    source = Path(locate(model))
    return [to_gguf(source, folder / f"{Path(model).name}.{dtype}.gguf", dtype) for dtype in dtypes]


def device_rows(model: str, runs: Sequence[Sequence[dict]]) -> list[dict]:
    """Rows of the table `device` from several runs of `measured` for one model, each of which begins with the dense file.

    `mb` of the file; `times_dense` with its interval: perplexity over that of the dense model in 16 bits, both in llama.cpp;
    `expected`: how many times as fast as that file it writes if its bytes are all that counts. The dense file is kept once, and
    `decode_tokens_per_s` and `first_token_ms` are its own times what each run says of both: a busy minute slows a whole run.
    """
    first, table = runs[0][0], []
    for row in [first, *(row for run in runs for row in run[1:])]:
        ratio = common_ratio(row["perplexity"], first["perplexity"])
        table.append({"model": model} | {name: row[name] for name in ("method", "size", "kind")})
        table[-1] |= {"mb": row["bytes"] / 1e6, "perplexity": row["perplexity"]["perplexity"]}
        table[-1] |= {"times_dense": ratio.estimate, "low": ratio.low, "high": ratio.high}
        table[-1] |= {name: row[name] for name in ("reads", "writes", "expected")}
        table[-1] |= {"decode_tokens_per_s": first["decode_tokens_per_s"] * row["writes"]}
        table[-1] |= {"first_token_ms": first["first_token_ms"] / row["reads"]}
        table[-1] |= {"kv_bytes_per_token": row["kv_bytes_per_token"], "used_mb": row["used"] / 1e6}
    return table


def runnable(subjects: Sequence) -> list:
    """The subjects that llama.cpp can run here; prints the reason for each of the others."""
    found = []
    for subject in subjects:
        try:
            check_installed()
            check_config(subject.model.config)
            found.append(subject)
        except (ValueError, ModuleNotFoundError) as reason:
            print(f"{subject.name}: not in llama.cpp here, because {reason}")
    return found


def front(rows: Sequence[dict]) -> list[dict]:
    """The rows that no other beats, the largest first: none has at most as many bytes and a lower perplexity."""
    best = [row for row in rows if not any(o["mb"] <= row["mb"] and o["times_dense"] < row["times_dense"] for o in rows)]
    return sorted(best, key=lambda row: -row["mb"])


def named(row: dict) -> str:
    return f"{row['method']} {row['size']:.0%}, {row['kind']}" if row["size"] else f"{row['method']}, {row['kind']}"


def answer(rows: Sequence[dict]) -> list[str]:
    """Prune or quantise, in sentences, from the rows of one model."""
    dense = {row["kind"]: row for row in rows if row["method"] == DENSE}
    pruned = [row for row in rows if row["method"] != DENSE]
    listed = "; ".join(f"{named(row)} ({row['mb']:.3g} MB, {row['times_dense']:.2f} times dense)" for row in front(rows))
    lines = [f"{headline(rows)}.", f"Files that no other beats in bytes and perplexity: {listed}."]
    for row in pruned:
        if row["kind"] == FULL:
            cache = row["kv_bytes_per_token"] / dense[FULL]["kv_bytes_per_token"]
            speeds = (
                f"reads {row['reads']:.2f} and writes {row['writes']:.2f} times as fast as dense (bytes: {row['expected']:.2f})"
            )
            lines.append(f"{named(row)}: {cache:.2f} of the cache, {speeds}.")
    slow = [named(row) for row in pruned if row["writes"] < REACHED * promised(row, dense[row["kind"]])]
    lines.append(
        "For each word a model reads all of its bytes, so a file half as large as the dense one of its kind could write twice as "
        f"fast. Slower than {REACHED} of that: {'; '.join(slow) or 'none'}."
    )
    if (apart := scatter(pruned)) > 1:
        lines.append(
            f"Files of the same shape write up to {apart:.2f} times as fast as each other here: what is nearer is not told apart."
        )
    return lines


def promised(row: dict, dense: dict) -> float:
    """How many times as fast as dense in 16 bits a file writes if it has the bytes a second of the dense file of its kind."""
    return dense["writes"] * dense["mb"] / row["mb"]


def scatter(rows: Sequence[dict]) -> float:
    """The largest ratio of the speeds of writing of two files of equal kind and bytes, which have equal shapes; 1 without any."""
    alike: dict[tuple, list[float]] = {}
    for row in rows:
        alike.setdefault((row["kind"], row["mb"]), []).append(row["writes"])
    return max((max(speeds) / min(speeds) for speeds in alike.values()), default=1.0)


def headline(rows: Sequence[dict]) -> str:
    """Where pruned files of one model are on the front, in a few words."""
    whole, four = (next(r["mb"] for r in rows if r["method"] == DENSE and r["kind"] == kind) for kind in (FULL, FOUR))
    above = [named(row) for row in front(rows) if row["method"] != DENSE and row["mb"] >= four]
    if above:
        return f"{rows[0]['model']}: as large as four bits alone or larger, and yet the best of their size: {'; '.join(above)}"
    return f"{rows[0]['model']}: four bits alone are the better deal down to {four:.1f} MB, {four / whole:.0%} of 16 bits"
