"""Tiny random models of every family, made so that mistakes show: big gains, biases, embeddings with large row means."""

import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests never need a network

import pytest
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lib.primitives.calibration import ResidualStream

VOCABULARY, WIDTH, LAYERS = 80, 32, 3
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
OPT = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=48, num_hidden_layers=LAYERS,
    num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, dropout=0.0,
)  # fmt: skip


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


CONFIGS = {
    "llama": lambda **kw: transformers.LlamaConfig(**COMMON | kw),
    "mistral": lambda **kw: transformers.MistralConfig(**COMMON | kw),
    "qwen2": lambda **kw: transformers.Qwen2Config(**COMMON | kw),
    "qwen3": lambda **kw: transformers.Qwen3Config(**COMMON | kw),
    "opt": lambda **kw: transformers.OPTConfig(**OPT | kw),
    "phi": lambda **kw: transformers.PhiConfig(**without(COMMON, "head_dim") | kw),
    "gpt_neox": lambda **kw: transformers.GPTNeoXConfig(**without(COMMON, "head_dim", "num_key_value_heads") | kw),
    "gemma3_text": lambda **kw: transformers.Gemma3TextConfig(
        **COMMON | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]) | kw
    ),
}
SLICEABLE = ("llama", "mistral", "qwen2", "qwen3", "opt", "phi", "gpt_neox")


def tiny(family: str, dtype=torch.float64, attention: str = "sdpa", seed: int = 0, **settings):
    """A random model of `family` in eval mode."""
    config = CONFIGS[family](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter += 1.0
            if "embed" in name:
                parameter += 0.5  # a row mean that centring by mistake would remove
    return model.to(dtype).eval()


def token_ids(samples: int = 6, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers computes RMS norms in float32 even in a float64 model; this lifts that, so 1e-10 can be asked for."""

    def rms(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for cls in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(cls, "forward", lambda self, x: self.weight * rms(self, x))
    monkeypatch.setattr(Gemma3RMSNorm, "_norm", lambda self, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))
    monkeypatch.setattr(Gemma3RMSNorm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def data_dir(monkeypatch):
    """Let corpora and benchmarks be read from a folder."""
    return lambda folder: monkeypatch.setenv("PARED_DATA_DIR", str(folder))


@pytest.fixture
def batches_of(monkeypatch):
    """Let every stream carry its calibration set in batches of another size."""
    return lambda n: monkeypatch.setattr(ResidualStream.__init__, "__defaults__", (n,))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
