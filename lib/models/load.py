"""Load models by one name: embedded, Gemma's package, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lib.evaluation.console import no_progress_bars
from lib.models.checkpoint import is_checkpoint, load_checkpoint
from lib.models.gguf_import import GEMMA, gemma_folder, gguf_folder
from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import choose_one

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("wiki-a-llama", "wiki-a-opt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(name: str, device: str = "cpu", dtype: str | torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """Model in eval mode and its tokenizer, for `wiki-a-llama`, `wiki-a-opt`, `gemma-3-270m`, a folder, a .gguf file or a hub id.

    A local folder is in the Hugging Face format, or a compressed model that `lib.models.checkpoint.save` wrote. GGUF weights are
    dequantised once into a cache (lib/models/gguf_import.py).

    Never runs remote code. Raises ValueError for an unknown dtype, FileNotFoundError if the model cannot be found.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(dtype, str):
        choose_one("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype]
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available, because torch sees no GPU: use device cpu")
    source = locate(name)
    compressed = is_checkpoint(source)
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            if not compressed:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    except OSError as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"the model folder {name} is not complete: {error}") from error
        raise FileNotFoundError(
            f"no model {name!r}: it is not embedded ({', '.join(EMBEDDED)}), not {GEMMA}, not a local folder, "
            f"and the hub did not give it "
            f"({type(error).__name__}). Check the name, the network, and for gated models the licence and login"
        ) from error
    if len(tokenizer) < 2:
        raise FileNotFoundError(f"the model folder {name} has no tokenizer files: add those of the original model")
    if compressed:
        return load_checkpoint(source, device, dtype), tokenizer
    return model.to(device).eval(), tokenizer


def spread(model: nn.Module, max_memory: dict | None = None, offload_folder: str | Path | None = None) -> nn.Module:
    """The model with its blocks over all GPUs, then main memory, then `offload_folder`, to evaluate models larger than one GPU.

    max_memory: bytes for GPU numbers and "cpu"; None for all free memory, including the model's own place in main memory.
    accelerate moves weights to where they run. The result can be run, not compressed: `invoke compress --streamed` is for
    models of that size.
    """
    import accelerate

    if max_memory is None:
        max_memory = accelerate.utils.get_max_memory()
        max_memory["cpu"] += sum(p.numel() * p.element_size() for p in model.parameters())
    whole = [type(block).__name__ for block in Anatomy(model).blocks[:1]]  # a residual connection stays on one device
    places = accelerate.infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
    main = next((place for place in places.values() if isinstance(place, int)), "cpu")
    return accelerate.dispatch_model(model, places, main_device=main, offload_dir=offload_folder)


def locate(name: str) -> str:
    """The folder of an embedded, converted or local model, or the name itself for the hub to resolve."""
    if name in EMBEDDED:
        if not (ASSETS / name / "config.json").is_file():
            raise FileNotFoundError(f"the embedded model {name} is not installed: rebuild it with `invoke train-workshop-models`")
        return str(ASSETS / name)
    if name == GEMMA:
        return str(gemma_folder())
    if str(name).endswith(".gguf"):
        return str(gguf_folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json: give a folder in the Hugging Face format")
        return str(folder)
    if str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {folder}: give an existing model folder, or a hub id like facebook/opt-125m")
    return str(name)


def positions_of(name: str) -> int:
    """Longest sequence of a model, from its configuration alone."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate(name), trust_remote_code=False).max_position_embeddings
    except OSError as error:
        raise FileNotFoundError(f"no configuration of model {name!r} can be reached: check the name and the network") from error


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device: GPUs, and CPUs with units for them."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    known = flags.read_text() if flags.is_file() else ""
    return "amx_bf16" in known or "avx512_bf16" in known
