"""Package versions of this process, and its memory, now and at a peak. Imports torch only to measure a GPU."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
from collections.abc import Callable

PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "peft", "gensim", "tokenizers", "numpy")


@functools.cache
def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes that `run` needs at its peak beyond what was in use before: resident memory on Linux, or that of a GPU.

    Memory that the allocator keeps after earlier work is returned first, or a second run would seem to need nothing.
    None where the system offers no such counter.
    """
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:  # "5" resets the peak counter to the present size
            file.write("5")
    except (OSError, AttributeError):  # macOS, Windows, other C libraries
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def resident_memory() -> int | None:
    """Bytes of memory that this process holds now (Linux), or None."""
    try:
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
