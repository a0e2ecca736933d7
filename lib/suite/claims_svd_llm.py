"""The claims of SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378)."""

from __future__ import annotations

from collections.abc import Callable

from lib.evaluation.paired import Interval, envelope
from lib.suite.claim import ABOVE, POSITIVE, Claim, Evidence, accuracy, exactly, paired, ratio

PAPER, W, TUNED = "svd_llm", "SVD-LLM (W)", "SVD-LLM"
SEARCHED = "ASVD, with its search"
EQUAL_RANKS = ("SVD", "FWSVD", "ASVD")
LITTLE = (0.97, 1.03)  # "at most 3 %"
AT_40 = "at 40 %, or else at 20 %"  # profiles differ in the ratio at which they fine-tune


def hardest(ours: str, others: tuple[str, ...], level: float) -> Callable:
    """Perplexity of `ours` over that of the best of the others."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        found = [ratio(ours, other, level)(evidence, model) for other in others]
        return max((each for each in found if each), key=lambda each: each.estimate, default=None)

    return measure


def first_of(*measures: Callable) -> Callable:
    """The first of several measurements that a run has."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        return next((found for each in measures if (found := each(evidence, model))), None)

    return measure


def at_main(ours: str, other: str, **settings) -> Callable:
    """Perplexity of one method over another at the ratio that the run looks at."""
    return first_of(ratio(ours, other, 0.4, **settings), ratio(ours, other, 0.2, **settings))


def best_of_both(evidence: Evidence, model: str) -> Interval | None:
    parts = (W, "SVD-LLM (U)")
    return first_of(hardest(TUNED, parts, 0.4), hardest(TUNED, parts, 0.2))(evidence, model)


def between_draws(evidence: Evidence, model: str) -> Interval | None:
    """Perplexity with every draw of the calibration text over that with every other one."""
    cells = evidence.cells(model, W, 0.2)
    pairs = [paired([a], [b]) for i, a in enumerate(cells) for b in cells[:i]]
    return envelope(pairs) if pairs and all(pairs) else None


def loss_against_spectrum(evidence: Evidence, model: str) -> Interval | None:
    """The largest difference, over all matrices, of the measured loss and that which the dropped values predict."""
    rows = evidence.result(model, what="matrix loss")
    return rows and exactly(max(abs(row[W] - row["predicted"]) for row in rows))


def drone(what: str) -> Callable:
    """DRONE's loss or seconds over those of SVD-LLM, for the largest matrix that was tried."""

    def measure(evidence: Evidence, model: str) -> Interval | None:
        found = evidence.result(model, what="drone")
        return found and exactly(found[-1][f"DRONE_{what}"] / found[-1][f"SVD-LLM_{what}"])

    return measure


def against_search(evidence: Evidence, model: str) -> Interval | None:
    """Seconds of SVD-LLM, adapters included, over those of ASVD with its search."""
    search = evidence.result(model, what="rank search")
    ours = evidence.result(model, what="time", method=TUNED)
    return search and ours and exactly(ours / search["seconds"])


def latent_share(evidence: Evidence, model: str) -> Interval | None:
    """Bytes of the latents over (1 - R) / 2 of the ordinary cache, at 20 %."""
    found = evidence.result(model, what="memory", ratio=0.2)
    return found and exactly(found["latent_bytes"] / found["cache_bytes"] / 0.4)


def prefill(evidence: Evidence, model: str) -> Interval | None:
    """Tokens a second of the largest batch at 40 % over those of the dense network."""
    found = evidence.result(model, what="throughput", batch=8)
    rates = [found[R]["prefill_tokens_per_s"] for R in ("0.4", "0.0") if R in found] if found else []
    return exactly(rates[0] / rates[1]) if len(rates) == 2 else None


CLAIMS = (
    Claim(
        PAPER, "Whitening alone is far ahead of SVD and FWSVD at 20 %.", "Table 1", "7.94 against 20,061 and 1,727",
        "perplexity of W over that of the best rival with equal ranks", measure=hardest(W, EQUAL_RANKS, 0.2),
    ),
    Claim(
        PAPER, "Whitening alone is far ahead of SVD and FWSVD at 40 %.", "Table 1", "13.73 against 52,489 and 18,156",
        "perplexity of W over that of the best rival with equal ranks", measure=hardest(W, EQUAL_RANKS, 0.4),
    ),
    Claim(
        PAPER, "Whitening alone is ahead of ASVD at 20 %.", "Table 1", "7.94 against 11.14",
        "perplexity of W with equal ranks over that of ASVD with its search", measure=ratio(W, SEARCHED, 0.2),
    ),
    Claim(
        PAPER, "Whitening alone is far ahead of ASVD at 40 %.", "Table 1", "13.73 against 1,407",
        "perplexity of W with equal ranks over that of ASVD with its search", measure=ratio(W, SEARCHED, 0.4),
    ),
    Claim(
        PAPER, "From 40 % on, perplexity is at least 99 % below that of the rivals.", "Section 4.1, Table 1",
        "9.27 against 1,407 at 40 %", "perplexity of SVD-LLM over that of the best rival, at 40 %", (0.0, 0.01),
        hardest(TUNED, (*EQUAL_RANKS, SEARCHED), 0.4),
    ),
    Claim(
        PAPER, "Whitening answers more zero-shot questions than ASVD at 20 %.", "Table 1", "mean of 0.49 against 0.45",
        "accuracy of W minus that of ASVD with equal ranks, in points", POSITIVE, accuracy(W, "ASVD", 0.2),
    ),
    Claim(
        PAPER, "Whitening brings more than the update, at 20 %.", "Table 4", "W 7.94, U 10.12",
        "perplexity of W over that of U", measure=ratio(W, "SVD-LLM (U)", 0.2),
    ),
    Claim(
        PAPER, "Whitening brings more than the update, at 40 %.", "Table 4", "W 13.11, U 19.28",
        "perplexity of W over that of U", measure=ratio(W, "SVD-LLM (U)", 0.4),
    ),
    Claim(
        PAPER, "Whitening and update together are better than either.", "Table 4", "9.27 against 13.11 and 19.28 at 40 %",
        f"perplexity of both over that of the better part, {AT_40}", measure=best_of_both,
    ),
    Claim(
        PAPER, "It hardly matters which factor is trained first.", "Table 5", "9.32 and 9.27 at 40 %",
        f"perplexity of u first over that of v first, {AT_40}", LITTLE, at_main(TUNED, "v, then u"),
    ),
    Claim(
        PAPER, "Training the factors in turn is better than training both at once.", "Table 15", "9.27 against 11.98 at 40 %",
        f"perplexity in turn over that at once, {AT_40}", measure=at_main(TUNED, "both factors at once"),
    ),
    Claim(
        PAPER, "With the same update, SVD-LLM is better than ASVD.", "Table 15", "9.27 against 14.86 at 40 %",
        f"perplexity of SVD-LLM over that of ASVD with adapters in turn, {AT_40}", measure=at_main(TUNED, "ASVD, in turn"),
    ),
    Claim(
        PAPER, "The seed of the calibration text changes perplexity by at most 3 %.", "Figure 5", "6.70 for six seeds",
        "perplexity of W at 20 % with one draw over that with another", LITTLE, between_draws,
    ),
    Claim(
        PAPER, "The source of the calibration text changes perplexity by at most 3 %.", "Table 6", "WikiText-2 7.73, C4 7.79",
        f"perplexity of W with other calibration text (embedded models: text they know) over the usual one, {AT_40}", LITTLE,
        at_main("SVD-LLM (W), another text", W, draw={"seed": 0}),
    ),
    Claim(
        PAPER, "At equal memory, SVD-LLM with adapters is better than SliceGPT.", "Table 7", "7.92 against 8.78 at 10 GB",
        "perplexity of SVD-LLM at 20 % over that of SliceGPT at its size", measure=ratio(TUNED, "SliceGPT, equal size", 0.2),
    ),
    Claim(
        PAPER, "At 20 %, SVD-LLM with adapters is better than FLAP.", "Table 11", "7.73 against 7.99",
        "perplexity of SVD-LLM over that of FLAP at its size", measure=ratio(TUNED, "FLAP, equal size", 0.2),
    ),
    Claim(
        PAPER, "At 40 %, SVD-LLM with adapters is better than FLAP.", "Table 11", "9.27 against 14.43",
        "perplexity of SVD-LLM over that of FLAP at its size", measure=ratio(TUNED, "FLAP, equal size", 0.4),
    ),
    Claim(
        PAPER, "Dropping singular values costs exactly the root of the sum of their squares.", "Theorem 3.2, Figure 2", "exact",
        "largest difference of predicted and measured relative loss", (-1e-5, 1e-5), loss_against_spectrum,
    ),
    Claim(
        PAPER, "DRONE has the same minimum.", "Table 9", "17,785.70 against 17,784.27 (2048)",
        "loss of DRONE over that of SVD-LLM", (0.999, 1.001), drone("loss"),
    ),
    Claim(
        PAPER, "DRONE takes more time.", "Table 10", "5.81 against 1.98 seconds (2048)",
        "seconds of DRONE over those of SVD-LLM", ABOVE, drone("seconds"),
    ),
    Claim(
        PAPER, "SVD-LLM with its update takes less time than ASVD with its search.", "Table 13", "3.5 against 5.5 hours",
        "seconds of SVD-LLM over those of ASVD", measure=against_search,
    ),
    Claim(
        PAPER, "Latents take half of 1 - R of the cache.", "Section 4.2, Figure 4", "2.4 of 4 GB saved at 20 %",
        "bytes of the latents over half of 1 - R of the cache", (0.99, 1.01), latent_share,
    ),
    Claim(
        PAPER, "A compressed model reads prompts faster.", "Figure 3", "no number", "tokens a second at 40 % over dense, one run",
        ABOVE, prefill,
    ),
    Claim(
        PAPER, "SVD-LLM is better than its rivals on models of 13 and 30 billion parameters.", "Table 3", "6.43 and 5.14",
        reason="models of that size do not fit here",
    ),
    Claim(
        PAPER, "It is better than the post-training quantisation to one or two bits.", "Table 8", "47.21 against 47.67",
        reason="PB-LLM, BiLLM, OneBit and QuIP# are not part of this suite",
    ),
    Claim(
        PAPER, "A compressed model is better than one of its size trained from scratch.", "Table 12", "0.46 against 0.44",
        reason="the model trained from scratch here sees far less text than the dense one did",
    ),
)  # fmt: skip
