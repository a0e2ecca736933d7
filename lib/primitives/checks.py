"""Checks of arguments: one of a few names, a share in [0, 1); and the exact fraction behind a float."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction


def choose_one(kind: str, value: object, known: Iterable) -> object:
    """`value` itself if it is one of `known`; ValueError, naming all of them, if not."""
    known = list(known)  # a value that cannot be hashed is unknown, too
    if value not in known:
        raise ValueError(f"unknown {kind} {value!r}: choose one of {', '.join(map(str, known))}")
    return value


def check_share(share: float, what: str = "ratio", example: str = "0.2 removes a fifth of the parameters") -> None:
    """Raise ValueError for a share outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"{what} must be in [0, 1), not {share}: {example}")


def check_inplace(inplace: bool, ratios: Sequence) -> None:
    """Raise ValueError for several ratios in place: the first would use up the dense model."""
    if inplace and len(ratios) != 1:
        raise ValueError("working in place consumes the dense model: give exactly one ratio")


def exact(share: float) -> Fraction:
    """The fraction that a float stands for: 4/5 for 0.8, where binary arithmetic makes 1023 of (1 - 0.8) 5120."""
    return Fraction(share).limit_denominator(10**6)


def kept_share(ratio: float) -> Fraction:
    """1 - R as the fraction that the float R stands for. Raises ValueError for an R outside [0, 1)."""
    check_share(ratio)
    return 1 - exact(ratio)
