"""Checks of arguments: settings by type, range and choices, a share in [0, 1); and the exact fraction behind a float."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from fractions import Fraction

# Intervals of settings.
ANY, COUNTS, FROM_ZERO = "(-inf, inf)", "[1, inf)", "[0, inf)"


def choose_one(kind: str, value: object, known: Iterable) -> object:
    """`value` itself if it is one of `known`; ValueError, naming all of them, if not."""
    known = list(known)  # a value that cannot be hashed is unknown, too
    if value not in known:
        raise ValueError(f"unknown {kind} {value!r}: choose one of {', '.join(map(str, known))}")
    return value


def check_settings(record: object, **rules: str | Iterable) -> None:
    """Raise ValueError, with an example, for a field of a settings record that is not of its annotated type or breaks its rule.

    rules: for a field, an interval such as "[0, 1)", or the values that it can have. A number without a rule may be any but NaN
    and infinity. The parts of a tuple are checked one by one; None needs no rule.
    """
    hints = typing.get_type_hints(type(record))
    for field in fields(record):
        name, value = field.name, getattr(record, field.name)
        rule = rules.get(name, ANY)
        if not fits(value, hints[name]):
            raise ValueError(_wanted(name, value, hints[name], rule, field.default))
        for part in value if isinstance(value, tuple) else (value,):
            if not isinstance(rule, str):
                choose_one(name, part, rule)
            elif type(part) in (int, float) and not _within(part, rule):
                raise ValueError(_wanted(name, value, hints[name], rule, field.default))


def fits(value: object, kind: object) -> bool:
    """Whether a value is of the kind that a field is annotated with: int, float, bool, str, None, tuples and unions of them."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(part, typing.get_args(kind)[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # more than torch can hold
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _within(number: float, interval: str) -> bool:
    low, high = (int(end) if end.isdecimal() else float(end) for end in interval[1:-1].split(", "))
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def _wanted(name: str, value: object, kind: object, rule: str | Iterable, example: object) -> str:
    """What is wrong with the value of a setting, what it can be, and an example: its default or a pair of numbers."""
    where = f" in {rule}" if isinstance(rule, str) and rule != ANY else ""
    if where.endswith(", inf)") and where.startswith(" in ["):
        where = f" of at least {rule[1:-6]}"
    words = {int: f"a whole number{where}", float: f"a number{where}", bool: "yes or no", str: "a word", type(None): "null"}
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    sequence = "tuple" if isinstance(value, list) else "list"  # a list from the command line has become a tuple
    given = [words.get(part) or f"a {sequence}, each part {words[typing.get_args(part)[0]]}" for part in parts]
    if example is None:
        example = 0.5 if float in parts else (0, 1)
    if isinstance(example, tuple):
        example = f"[{', '.join(map(str, example))}]"
    elif isinstance(example, bool):
        example = "yes" if example else "no"
    shown = "" if example is MISSING else f", as in {name}={example}"
    return f"{name} is {value!r}: give {' or '.join(given)}{shown}"


def check_share(share: float, what: str = "ratio", example: str = "0.2 removes a fifth of the parameters") -> None:
    """Raise ValueError for a share outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"{what} must be in [0, 1), not {share}: {example}")


def check_blocks(protect: Sequence[int], blocks: int) -> None:
    """Raise ValueError for blocks to protect that a model with this many blocks does not have."""
    if unknown := set(protect) - set(range(blocks)):
        raise ValueError(f"cannot protect block {min(unknown)}: the model has blocks 0 to {blocks - 1}")


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
