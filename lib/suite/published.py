"""Numbers printed in the papers, for tables that show them beside ours. None of them was measured by us."""

from __future__ import annotations

SLICEGPT_MODELS = (
    "OPT-125M", "OPT-1.3B", "OPT-2.7B", "OPT-6.7B", "OPT-13B", "OPT-30B", "OPT-66B",
    "Llama-2-7B", "Llama-2-13B", "Llama-2-70B",
)  # fmt: skip


def _by_model(rows: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {name: dict(zip(SLICEGPT_MODELS, values, strict=True)) for name, values in rows.items()}


# arXiv 2401.15024, Table 1: WikiText-2 perplexity, calibrated on 1,024 WikiText-2 samples of 2,048 tokens.
SLICEGPT_TABLE_1 = _by_model(
    {
        "dense": (27.64, 14.61, 12.46, 10.85, 10.12, 9.56, 9.33, 5.47, 4.88, 3.32),
        "SparseGPT 2:4": (45.07, 29.61, 14.90, 13.00, 11.80, 10.53, 10.22, 8.69, 7.07, 4.98),
        "SliceGPT 10%": (29.34, 15.10, 12.75, 10.92, 10.27, 9.65, 9.43, 5.89, 5.21, 3.69),
        "SliceGPT 20%": (34.26, 16.43, 13.73, 11.48, 10.66, 9.87, 9.57, 6.64, 5.81, 4.25),
        "SliceGPT 25%": (37.74, 17.46, 14.56, 11.90, 10.94, 10.04, 9.68, 7.24, 6.30, 4.60),
        "SliceGPT 30%": (43.98, 19.09, 15.83, 12.51, 11.33, 10.27, 9.85, 8.12, 6.99, 5.05),
    }
)

# Tables 5 and 4: the same with 128 samples, the eigendecompositions in float64 and in float32.
SLICEGPT_TABLE_5_FLOAT64 = _by_model(
    {
        "SliceGPT 10%": (29.33, 15.15, 12.82, 11.00, 10.30, 9.66, 9.43, 5.96, 5.29, 3.78),
        "SliceGPT 20%": (34.53, 16.58, 13.89, 11.62, 10.75, 9.91, 9.61, 6.86, 6.04, 4.46),
        "SliceGPT 25%": (38.13, 17.78, 14.84, 12.12, 11.08, 10.10, 9.76, 7.56, 6.61, 4.89),
        "SliceGPT 30%": (44.61, 19.61, 16.30, 12.81, 11.55, 10.32, 9.95, 8.64, 7.44, 5.42),
    }
)
SLICEGPT_TABLE_4_FLOAT32 = _by_model(
    {
        "SliceGPT 10%": (29.48, 15.15, 12.83, 11.05, 10.28, 9.68, 9.45, 6.51, 5.64, 4.20),
        "SliceGPT 20%": (34.12, 16.51, 13.87, 11.64, 10.73, 9.94, 9.80, 7.30, 6.07, 5.82),
        "SliceGPT 25%": (38.25, 17.67, 14.78, 12.14, 11.08, 10.15, 9.81, 8.52, 6.65, 7.01),
        "SliceGPT 30%": (44.17, 19.33, 16.20, 12.82, 11.53, 10.43, 9.99, 10.41, 7.49, 8.75),
    }
)

# arXiv 2403.07378 (SVD-LLM). Perplexity on WikiText-2 unless said otherwise, calibrated on 256 WikiText-2 samples of 2,048
# tokens; ratio: removed share of the matrices. "SVD-LLM" is W with sequential LoRA on 50,000 Alpaca instructions.
SVD_LLM_RATIOS = (0.2, 0.4, 0.6, 0.8)


def _by_ratio(rows: dict[str, tuple[float, ...]]) -> dict[str, dict[float, float]]:
    return {name: dict(zip(SVD_LLM_RATIOS, values, strict=False)) for name, values in rows.items()}


# Table 1, LLaMA-7B.
SVD_LLM_TABLE_1_DENSE = 5.68
SVD_LLM_TABLE_1 = _by_ratio(
    {
        "SVD": (20061, 52489, 105474, 687291),
        "FWSVD": (1727, 18156, 32194, 96872),
        "ASVD": (11.14, 1407, 57057, 80425),
        "SVD-LLM (W)": (7.94, 13.73, 66.62, 1349),
        "SVD-LLM": (7.73, 9.27, 15.00, 31.79),
    }
)
# Table 2, 20 %.
SVD_LLM_TABLE_2 = {
    "OPT-6.7B": {"dense": 10.86, "SVD": 66275, "FWSVD": 14559, "ASVD": 82.00, "SVD-LLM (W)": 16.04, "SVD-LLM": 14.47},
    "LLaMA-2-7B": {"dense": 5.47, "SVD": 18192, "FWSVD": 2360, "ASVD": 10.10, "SVD-LLM (W)": 8.50, "SVD-LLM": 7.73},
}
# Table 4, LLaMA-7B. Its rows W at 40 and 60 % differ from Table 1: they seem to be W+U of the first version.
SVD_LLM_TABLE_4 = _by_ratio(
    {
        "SVD-LLM (W)": (7.94, 13.11, 42.30),
        "SVD-LLM (U)": (10.12, 19.28, 49.88),
        "SVD-LLM": (7.73, 9.27, 15.00),
    }
)
# Table 5, LLaMA-7B: which factor is trained first.
SVD_LLM_TABLE_5 = _by_ratio({"u, then v": (7.85, 9.32, 13.20, 31.67), "v, then u": (7.73, 9.27, 15.00, 31.79)})
# Table 13, LLaMA-7B at 20 %, one A100: hours.
SVD_LLM_TABLE_13_HOURS = {"SVD-LLM (W)": 1 / 6, "SVD-LLM": 3.5, "ASVD with rank search": 5.5}
# Table 15, LLaMA-7B.
SVD_LLM_TABLE_15 = _by_ratio({"both factors at once": (7.87, 11.98, 16.30, 80.23), "in turn": (7.73, 9.27, 15.00, 31.79)})
# Figure 4, read from the plot: peak memory of LLaMA-7B in GB, batch 32, 128 generated tokens; dense 17.7.
SVD_LLM_FIGURE_4_DENSE = 17.7
SVD_LLM_FIGURE_4 = _by_ratio({"weights factored": (14.4, 12.0, 9.5, 7.1), "and latent cache": (12.0, 9.2, 6.3, 3.5)})

# Kobayashi et al., 2025 (Structured AFR), Llama-3-8B, removed FFN neurons: accuracy in percent, Tables 1 to 3, on
# WinoGrande, HellaSwag, ARC-easy, ARC-challenge and MMLU.
AFR_DENSE = (72.61, 79.16, 77.74, 53.33, 62.13)
AFR_TABLES = {
    0.2: {
        "unstructured AFR": (71.59, 73.79, 76.94, 48.38, 58.85),
        "simple mean": (59.35, 53.63, 43.48, 29.35, 30.14),
        "absolute only": (67.40, 67.90, 70.20, 42.83, 32.81),
        "GMM only": (68.57, 70.70, 70.58, 44.80, 42.86),
        "absolute + GMM": (68.90, 69.70, 72.81, 46.16, 49.32),
        "LLM-Pruner": (69.85, 69.02, 63.59, 40.53, 48.36),
        "LoRAP": (71.19, 70.48, 69.61, 45.48, 44.57),
        "CFSP": (68.67, 68.06, 67.63, 42.92, 50.71),
    },
    0.5: {
        "unstructured AFR": (60.62, 50.64, 55.35, 32.94, 35.07),
        "simple mean": (52.25, 29.29, 29.92, 26.02, 23.07),
        "absolute only": (52.96, 37.88, 43.18, 25.94, 23.04),
        "GMM only": (58.41, 48.59, 48.36, 29.78, 27.78),
        "absolute + GMM": (56.75, 47.33, 51.89, 29.95, 28.27),
        "LLM-Pruner": (52.49, 35.50, 37.88, 25.51, 22.95),
        "LoRAP": (57.30, 40.19, 42.60, 26.79, 26.85),
        "CFSP": (57.06, 43.13, 48.53, 28.50, 26.61),
    },
}
# The averages that the same tables print. Two are not the mean of their own row: absolute + GMM, 61.38 and 42.84 recomputed.
AFR_PRINTED_AVERAGES = {
    0.2: dict(zip(AFR_TABLES[0.2], (65.91, 43.19, 56.23, 59.50, 61.25, 58.26, 60.27, 59.60), strict=True)),
    0.5: dict(zip(AFR_TABLES[0.5], (46.92, 32.11, 36.60, 42.58, 43.44, 34.87, 38.75, 40.77), strict=True)),
}


def afr_average(ratio: float, method: str) -> float:
    """Mean accuracy of a row of Tables 1 to 3, recomputed from its five tasks; ratio 0 is the dense model."""
    row = AFR_DENSE if ratio == 0 else AFR_TABLES[ratio][method]
    return sum(row) / len(row)


# Figure 2: the range of one layer's scores on Llama-3-8B before and after clipping.
AFR_FIGURE_2_RANGES = (12687, 48.8)

# Table 4: parameters, "VRAM" in GB and milliseconds per sample (hardware and batch size are not stated). 16.06 and 10.42 are two
# bytes per parameter in decimal GB; 13.08 at 20 % is not: 6.90e9 x 2 is 13.80, and two digits look swapped.
AFR_TABLE_4 = {
    0.0: {"params": 8.03e9, "vram_gb": 16.06, "ms_per_sample": 22.98},
    0.2: {"params": 6.90e9, "vram_gb": 13.08, "ms_per_sample": 20.89},
    0.5: {"params": 5.21e9, "vram_gb": 10.42, "ms_per_sample": 14.64},
}

# Xu et al., arXiv 2501.15255 (COMP), LLaMA-2-7B at 20 %, from the abstract; no table of the paper was available. Whether the gain
# over LLM-Pruner is in points or relative, and how memory was measured, is not stated.
COMP_GAIN_PERCENT = 6.13
COMP_MEMORY_SAVED = 0.80
