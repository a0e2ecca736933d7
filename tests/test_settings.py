"""Every setting of every method under values that make no sense: a ValueError that names it, before any work."""

import math
from dataclasses import fields, make_dataclass

import pytest
import torch

from lib.methods import METHODS, make, settings_of, without_effect
from lib.primitives.checks import check_settings
from tests.conftest import tiny, token_ids

RECORDS = {method.settings: name for name, method in METHODS.items()}  # one method for each record
FIELDS = [(name, field.name) for record, name in RECORDS.items() for field in fields(record)]
NEVER = (-1, -0.5, math.nan, -math.inf, 10**400, "nonsense", [], [-1], ["nonsense"], {}, object(), b"1", 1j)
# Values that some settings take.
DOUBTFUL = (0, 1, 2, 10**6, 1e300, math.inf, True, "", None, [10**6])
PROTECTS = {("afr", "protect"), ("llm-pruner", "protect")}  # of blocks, which may be none


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_values_that_cannot_be_are_refused_by_name(method, name):
    for value in NEVER:
        if value == [] and (method, name) in PROTECTS:
            continue
        with pytest.raises(ValueError, match=rf"\b{name[:5]}.*(: give |choose one|must be like)"):
            settings_of(method, {name: value})


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_every_value_works_or_is_refused(method, name):
    """Nothing but ValueError comes out, and what is accepted makes a model."""
    model, ids = tiny("llama"), token_ids(3, 12)
    for value in DOUBTFUL:
        try:
            small = make(method, model, ids, 0.3, **{name: value})
        except ValueError:
            continue
        assert torch.isfinite(small(ids).logits).all(), value


def test_records_check_themselves_without_the_command_line():
    for record in RECORDS:
        for field in fields(record):
            with pytest.raises(ValueError, match=field.name):
                record(**{field.name: object()})


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("slicegpt", {"seed": 3}, ["seed has no effect: slicegpt reads it only with orientation=random"]),
        ("slicegpt", {"seed": 3, "orientation": "random"}, []),
        ("slicegpt", {"schedule": [24] * 7}, ["ratio has no effect: slicegpt reads it only with schedule=constant or variance"]),
        ("comp", {"seed": 1, "metric": "random", "alpha": 0.1}, []),
        ("comp", {"alpha": 0.1, "allocation": "uniform"}, ["alpha has no effect: comp reads it only with allocation=importance"]),
        ("fpt", {"literal": True, "tuning": False}, ["literal has no effect: fpt reads it only with tuning=True"]),
        ("svd", {}, []),
    ],
)
def test_settings_without_effect_are_named(method, values, said):
    assert without_effect(method, values) == said


def test_what_is_said_to_have_no_effect_has_none():
    """Each pair is tried: with the other setting as said the value matters to nothing but the record."""
    model, ids = tiny("llama"), token_ids(3, 12)
    others = {"orientation": "pca", "allocation": "uniform", "metric": "C1", "tune": False, "attention": False, "tuning": False}
    changed = {"seed": 5, "alpha": 3.0, "gamma": 3.0, "variance_bound": 1e-9, "checks": 1, "fold": "strided", "literal": True}
    for name in ("slicegpt", "comp", "llm-pruner", "fpt"):
        for key, (other, _) in METHODS[name].settings.ONLY_WITH.items():
            if other != "schedule":
                first, second = (
                    make(name, model, ids, 0.3, **{other: others[other]} | more) for more in ({}, {key: changed[key]})
                )
                assert torch.equal(first(ids).logits, second(ids).logits), key


def test_a_number_without_a_rule_is_finite():
    record = make_dataclass("Record", [("number", float, 1.0)])
    with pytest.raises(ValueError, match="number is nan: give a number, as in number=1.0"):
        check_settings(record(math.nan))
