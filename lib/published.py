"""Numbers that the papers print, so that every table can show theirs beside ours. Nothing here was measured by us."""

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
