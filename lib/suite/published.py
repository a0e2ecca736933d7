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

# Tables 12 and 13: the same at 50 %; it is printed for these models alone.
SLICEGPT_HALF = {
    "OPT-13B": 15.39, "OPT-30B": 12.47, "OPT-66B": 11.39, "Llama-2-7B": 17.17, "Llama-2-13B": 13.71, "Llama-2-70B": 8.86,
}  # fmt: skip
# Table 3: minutes of slicing at 30 % and of recovery on Alpaca; one H100 for both, but four for the recovery of 70B.
SLICEGPT_TABLE_3_MINUTES = {"Llama-2-7B": (44, 23), "Llama-2-13B": (68, 44), "Llama-2-70B": (211, 95), "Phi-2": (49, 119)}
# Table 6 at 25 %, 128 samples: constant and varying widths.
SLICEGPT_TABLE_6 = {
    "OPT-6.7B": (12.10, 11.94), "OPT-13B": (11.04, 10.76), "OPT-30B": (10.13, 9.95), "OPT-66B": (9.75, 9.63),
    "Llama-2-7B": (6.84, 7.63), "Llama-2-13B": (6.00, 6.17), "Llama-2-70B": (4.44, 4.63),
}  # fmt: skip
# Tables 7 to 10: mean accuracy of five tasks in percent, Llama-2-7B, by slicing level; recovery on the corpus of calibration.
SLICEGPT_ACCURACY = {
    "WikiText-2": {0.0: 69.00, 0.2: 58.18, 0.25: 55.48, 0.3: 51.50},
    "Alpaca": {0.0: 69.00, 0.2: 63.68, 0.25: 60.91, 0.3: 57.93},
    "WikiText-2 + recovery": {0.0: 69.00, 0.2: 57.27, 0.25: 56.20, 0.3: 54.23},
    "Alpaca + recovery": {0.0: 69.00, 0.2: 65.46, 0.25: 63.04, 0.3: 61.34},
}

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
# Tables 2 and 3, 20 %.
SVD_LLM_METHODS = ("dense", "SVD", "FWSVD", "ASVD", "SVD-LLM (W)", "SVD-LLM")
SVD_LLM_TABLES_2_3 = {
    model: dict(zip(SVD_LLM_METHODS, values, strict=True))
    for model, values in {
        "OPT-6.7B": (10.86, 66275, 14559, 82.00, 16.04, 14.47),
        "LLaMA-2-7B": (5.47, 18192, 2360, 10.10, 8.50, 7.73),
        "Mistral-7B": (5.25, 159627, 6357, 13.72, 10.21, 7.47),
        "Vicuna-7B": (6.78, 18644, 2758, 16.23, 8.41, 7.43),
        "LLaMA-13B": (5.09, 946.31, 15.98, 6.74, 6.61, 6.43),
        "LLaMA-30B": (4.10, 54.11, 20.54, 22.71, 5.63, 5.14),
    }.items()
}
# Table 4, LLaMA-7B. Its rows W at 40 and 60 % differ from Table 1: they seem to be W+U of the first version.
SVD_LLM_TABLE_4 = _by_ratio(
    {
        "ASVD": (11.14, 1407, 57057),
        "SVD-LLM (W)": (7.94, 13.11, 42.30),
        "SVD-LLM (U)": (10.12, 19.28, 49.88),
        "SVD-LLM": (7.73, 9.27, 15.00),
    }
)
# Table 5, LLaMA-7B: which factor is trained first.
SVD_LLM_TABLE_5 = _by_ratio({"u, then v": (7.85, 9.32, 13.20, 31.67), "v, then u": (7.73, 9.27, 15.00, 31.79)})
# Table 6, LLaMA-7B at 20 %, with adapters: perplexity on WikiText-2 and on C4, by the source of the calibration text.
SVD_LLM_TABLE_6 = {"WikiText-2": (7.73, 12.23), "C4": (7.79, 11.97)}
# Table 7, LLaMA-7B: memory in GB; the row of SVD-LLM is with adapters, the others are not tuned.
SVD_LLM_TABLE_7_GB = (10, 9, 8, 7)
SVD_LLM_TABLE_7 = {
    "LLM-Pruner": (9.88, 12.21, 18.94, 21.68),
    "SliceGPT": (8.78, 12.73, 16.39, 27.41),
    "BlockPruner": (9.40, 12.76, 19.78, 43.05),
    "SVD-LLM": (7.92, 8.18, 8.33, 9.63),
}
# Table 8, LLaMA-7B: GB and perplexity.
SVD_LLM_TABLE_8 = {
    "PB-LLM": (1.9, 104.83),
    "BiLLM": (1.5, 47.67),
    "SVD-LLM": (1.5, 47.21),
    "OneBit, trained": (1.3, 10.20),
    "SVD-LLM 40 % + QuIP# 2 bit": (1.3, 9.83),
}
# Tables 9 and 10, random square matrices: loss ‖(W - W')X‖, and seconds for five compressions.
SVD_LLM_TABLE_9 = {
    128: {"minimum": 276.1130, "DRONE": 276.1130, "SVD-LLM": 276.1130},
    2048: {"minimum": 17784.2637, "DRONE": 17785.6992, "SVD-LLM": 17784.2676},
    4096: {"minimum": 50321.9141, "DRONE": 50337.2148, "SVD-LLM": 50321.9727},
}
SVD_LLM_TABLE_10_SECONDS = {
    128: {"DRONE": 0.07, "SVD-LLM": 0.02},
    2048: {"DRONE": 5.81, "SVD-LLM": 1.98},
    4096: {"DRONE": 30.35, "SVD-LLM": 10.37},
}
# Table 11, LLaMA-7B; SVD-LLM with adapters.
SVD_LLM_TABLE_11 = _by_ratio({"FLAP": (7.99, 14.43, 106.87, 15023), "SVD-LLM": (7.73, 9.27, 15.00, 31.79)})
# Table 12: mean accuracy on six tasks of two models of three billion parameters.
SVD_LLM_TABLE_12 = {"StableLM-3B, from scratch": 0.44, "LLaMA-3B, cut by SVD-LLM": 0.46}
# Table 13, LLaMA-7B at 20 %, one A100: hours.
SVD_LLM_TABLE_13_HOURS = {"SVD-LLM (W)": 1 / 6, "SVD-LLM": 3.5, "ASVD, with its search": 5.5}
# Table 15, LLaMA-7B.
SVD_LLM_TABLE_15 = _by_ratio(
    {
        "both factors at once": (7.87, 11.98, 16.30, 80.23),
        "ASVD, in turn": (8.37, 14.86, 44.81, 271),
        "in turn": (7.73, 9.27, 15.00, 31.79),
    }
)
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

# --- the field's own comparisons, of models of 7 to 8 billion parameters -------------------------------------------------------

# LowRankArena (arXiv 2608.26389), the main tables of its repository's README. Perplexity on the test split of WikiText-2 and on
# the first 262,144 tokens of C4's validation split, both in whole windows of 2,048 tokens without a special token; mean accuracy
# on BoolQ, ARC-easy, ARC-challenge, WinoGrande, PIQA, HellaSwag and OpenBookQA. No adapters. Ratio: removed share of the
# parameters, one minus the table's "keep"; whether embeddings and head count is not stated there, nor the calibration of these
# rows (its study of calibration sets has 256 WikiText-2 samples of 2,048). 0: the dense model. SVD-LLM is SVD-LLM (W).
LOW_RANK_ARENA = {
    "LLaMA-7B": {
        0.0: {"dense": (5.67, 7.20, 0.649)},
        0.2: {
            "ASVD": (8.60, 11.04, 0.609),
            "SVD-LLM": (7.88, 16.42, 0.501),
            "Dobi-SVD": (9.23, 19.01, 0.526),
            "Basis Sharing": (7.74, 15.51, 0.574),
            "MoDeGPT": (6.92, 10.87, 0.552),
        },
        0.4: {
            "ASVD": (3839.83, 4268.56, 0.357),
            "SVD-LLM": (13.74, 55.03, 0.399),
            "Dobi-SVD": (15.24, 48.37, 0.426),
            "Basis Sharing": (12.42, 41.13, 0.465),
            "MoDeGPT": (12.43, 23.40, 0.509),
        },
    },
    "Llama-3.1-8B": {
        0.0: {"dense": (6.24, 9.10, 0.716)},
        0.2: {
            "ASVD": (2011.38, 1281.96, 0.353),
            "SVD-LLM": (14.83, 80.94, 0.516),
            "Dobi-SVD": (556.59, 1008.41, 0.355),
            "Basis Sharing": (15.61, 54.36, 0.561),
            "MoDeGPT": (9.01, 17.68, 0.590),
        },
        0.4: {
            "ASVD": (22684.63, 14186.23, 0.351),
            "SVD-LLM": (199.84, 1187.78, 0.360),
            "Dobi-SVD": (987.51, 1529.38, 0.349),
            "Basis Sharing": (82.96, 461.21, 0.396),
            "MoDeGPT": (24.50, 51.82, 0.504),
        },
    },
    "Qwen3-8B-Base": {
        0.0: {"dense": (7.00, 11.78, 0.704)},
        0.2: {
            "ASVD": (11.88, 20.54, 0.641),
            "SVD-LLM": (11.08, 33.90, 0.595),
            "Dobi-SVD": (51.21, 236.65, 0.400),
            "Basis Sharing": (11.05, 31.67, 0.588),
            "MoDeGPT": (10.34, 22.46, 0.597),
        },
        0.4: {
            "ASVD": (1359.38, 1484.57, 0.375),
            "SVD-LLM": (20.44, 112.01, 0.425),
            "Dobi-SVD": (107.63, 610.21, 0.386),
            "Basis Sharing": (18.59, 95.39, 0.469),
            "MoDeGPT": (18.40, 55.66, 0.457),
        },
    },
}

# LEMS (Thoma et al., ICML 2026, openreview.net/forum?id=IjIgNPFuCt), the two tables of its repository's README. WikiText-2
# perplexity in windows of 2,048 tokens, calibrated on 256 WikiText-2 samples of 2,048, and mean accuracy in percent of lm-eval
# tasks (its code has eight: PIQA, OpenBookQA, HellaSwag, ARC-challenge, ARC-easy, WinoGrande, BoolQ, MathQA), the settings being
# the defaults of its code. Ratio: removed share of the parameters of the blocks' linear layers, one minus the table's "ratio".
LEMS_MODELS = ("Mistral-7B", "Llama-3-8B", "Qwen3-8B")


def _of_lems(rows: dict[str, tuple[tuple[float, float], ...]]) -> dict[str, dict[str, tuple[float, float]]]:
    return {method: dict(zip(LEMS_MODELS, values, strict=True)) for method, values in rows.items()}


# Of the first table; the second prints accuracies that differ by 0.01.
LEMS_DENSE = dict(zip(LEMS_MODELS, ((5.25, 63.95), (6.14, 63.34), (9.71, 62.03)), strict=True))
# One decomposition, which the table does not name, with ranks from several rules and searches.
LEMS_RANKS = {
    0.2: _of_lems(
        {
            "uniform": ((7.14, 52.35), (11.44, 47.69), (12.52, 53.56)),
            "ASVD": ((7.20, 47.81), (12.92, 45.95), (15.70, 47.72)),
            "SVD-LLM V2": ((7.13, 52.68), (11.40, 47.70), (12.52, 53.36)),
            "MRCS": ((7.11, 51.75), (11.99, 46.63), (14.52, 52.04)),
            "ATP": ((7.14, 52.35), (11.07, 51.56), (12.52, 53.56)),
            "LEMS": ((5.98, 57.67), (8.16, 55.99), (10.38, 59.28)),
        }
    ),
    0.4: _of_lems(
        {
            "uniform": ((14.38, 39.10), (48.56, 34.39), (21.68, 39.63)),
            "ASVD": ((16.78, 35.56), (75.21, 33.98), (29.22, 36.09)),
            "SVD-LLM V2": ((14.90, 39.29), (47.53, 34.43), (21.42, 39.74)),
            "MRCS": ((14.21, 37.44), (67.95, 33.41), (38.72, 36.42)),
            "ATP": ((13.59, 40.24), (25.14, 39.95), (19.47, 40.20)),
            "LEMS": ((10.58, 45.60), (17.86, 43.09), (15.70, 45.51)),
        }
    ),
}
# Several decompositions with uniform ranks; the last row adds the search to the one before it.
LEMS_DECOMPOSITIONS = {
    0.1: _of_lems(
        {
            "FWSVD": ((9.47, 56.93), (42.11, 48.88), (16.95, 53.82)),
            "ASVD": ((9.14, 57.30), (65.09, 47.89), (20.36, 51.19)),
            "SVD-LLM": ((6.46, 56.81), (10.14, 52.27), (12.52, 55.96)),
            "SVD-LLM V2": ((6.46, 56.78), (10.18, 52.17), (12.52, 55.80)),
            "Dobi-SVD": ((7.11, 55.17), (11.22, 52.98), (13.46, 55.48)),
            "GFWSVD": ((31.66, 40.73), (2569.75, 33.40), (171.49, 46.66)),
            "KFAC-SVD": ((6.22, 56.92), (8.84, 54.45), (11.51, 57.07)),
            "KFAC-SVD + LEMS": ((5.37, 62.77), (6.58, 61.99), (9.85, 62.89)),
        }
    ),
    0.3: _of_lems(
        {
            "FWSVD": ((34.84, 44.24), (716.39, 33.40), (41.37, 42.68)),
            "ASVD": ((28.16, 46.09), (10989.41, 33.03), (70.66, 43.10)),
            "SVD-LLM": ((10.96, 44.39), (34.64, 37.69), (17.11, 45.76)),
            "SVD-LLM V2": ((10.96, 44.35), (34.98, 37.70), (17.15, 45.62)),
            "Dobi-SVD": ((12.37, 42.94), (31.54, 38.48), (18.54, 46.24)),
            "GFWSVD": ((2549.75, 32.29), (41798.89, 31.77), (21684.98, 34.06)),
            "KFAC-SVD": ((9.29, 45.76), (19.43, 40.73), (14.69, 46.78)),
            "KFAC-SVD + LEMS": ((7.42, 51.52), (11.07, 49.39), (11.81, 53.80)),
        }
    ),
}

# NVIDIA's ModelOpt, examples/pruning of its repository (minitron_vs_puzzletron and puzzletron). It prints no perplexity.
# Qwen3-8B (advanced_compression_experiments.md, section 1.1, ModelOpt 0.43.0): billions of parameters, then MMLU (5-shot),
# HellaSwag (normalised by length) and GSM8K (flexible match). Both aim at 80 % of the model's memory, so parameters differ.
# Distillation: tokens of WikiText-103 (1.6 million) or of Nemotron Post-Training v2 (1.9 billion).
MODELOPT = {
    "Qwen3-8B": {
        "dense": (8.19, 0.7493, 0.7653, 0.8749),
        "Minitron, 8 of 36 blocks removed": (6.65, 0.5084, 0.5295, 0.0114),
        "Minitron, distilled on 1.6 million tokens": (6.65, 0.7302, 0.6166, 0.4761),
        "Minitron, distilled on 1.9 billion tokens": (6.65, 0.7394, 0.6357, 0.7453),
        "Puzzletron, widths of each block": (7.75, 0.5910, 0.6863, 0.5762),
        "Puzzletron, distilled on 1.6 million tokens": (7.75, 0.6921, 0.7390, 0.7612),
        "Puzzletron, distilled on 1.9 billion tokens": (7.75, 0.7186, 0.7381, 0.8378),
    },
    # puzzletron/Llama-3.1-8B-Instruct.md: MMLU alone, of a model of 50 % and one of 69 % of the size before (the latter on 100
    # questions of each subject), distilled on WikiText-103 for 100 steps, which makes the better of the two worse.
    "Llama-3.1-8B-Instruct": {
        "dense": (0.6839,),
        "Puzzletron to 69 %": (0.6626,),
        "Puzzletron to 69 %, distilled": (0.6496,),
        "Puzzletron to 50 %": (0.2316,),
        "Puzzletron to 50 %, distilled": (0.2960,),
    },
}
