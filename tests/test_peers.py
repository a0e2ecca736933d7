"""Packages beside ours: what a row says is what was measured, and a package that is not there is a row too."""

import pytest

from benchmarks import peers
from benchmarks.peers import Bench, Peer, blocks_for, our_model, rows_of
from lib.evaluation.perplexity import perplexity
from lib.methods import make
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count


@pytest.fixture(scope="module")
def bench():
    return Bench("wiki-a-llama", "wiki-a", "validation", 4, 64, 4)


def stand_in(package: str, what: str, ours: str) -> Peer:
    """A peer of an installed package that runs our own method, so that it has to be level with it."""
    return Peer(package, what, lambda model, ids, share: make("magnitude-neurons", model, ids, share), ours)


def test_a_row_says_what_was_measured(bench, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (stand_in("torch", "the same", "magnitude-neurons"),))
    row, ours = rows_of(bench, 0.25)
    small = make("magnitude-neurons", bench.model, bench.ids, 0.25)
    assert row["over_ours"] == pytest.approx(1.0)
    assert row["params"] == ours["params"] == count(small).params
    found, dense = (perplexity(model, bench.windows.flatten(), 64).perplexity for model in (small, bench.model))
    assert row["times_dense"] == pytest.approx(found / dense, rel=1e-6)
    assert (row["loads"], row["exports"]) == ("yes", "yes")
    assert row["seconds"] > 0


def test_what_does_not_run_is_a_row_that_says_why(bench, monkeypatch):
    def broken(model, ids, share):
        raise RuntimeError("no such device\nand more")

    absent = stand_in("no-such-package", "what it does", "magnitude-neurons")
    monkeypatch.setattr(peers, "PEERS", (absent, Peer("torch", "it fails", broken, "magnitude-neurons")))
    rows = rows_of(bench, 0.25)
    assert [row["loads"] for row in rows] == [
        "does not run: No package metadata was found for no-such-package", "does not run: no such device",
    ]  # fmt: skip


def test_our_method_of_the_same_kind_has_the_same_share(bench):
    blocks = len(Anatomy(bench.model).blocks)
    assert blocks_for(bench.model, 0.25) == pytest.approx(blocks * 0.25 * 0.66, abs=1)
    depth = our_model(Peer("", "", None, "shortgpt"), bench.model, bench.ids, 0.25)
    assert len(Anatomy(depth).blocks) == blocks - blocks_for(bench.model, 0.25)
    sparse = our_model(Peer("", "", None, "sparsegpt", {"pattern": "2:4"}), bench.model, bench.ids, 0.25)
    weight = Anatomy(sparse).blocks[0].mlp.up_proj.weight
    assert (weight.unflatten(1, (-1, 4)) == 0).sum(-1).min() >= 2
