"""Block importance against plain transformers runs, and ShortGPT's choices of blocks."""

import itertools
import math

import pytest
import torch
from torch import nn

from lib.baselines.shortgpt import Settings, angular_distances, block_influence, blocks_for, chosen_blocks, prune
from lib.primitives.anatomy import Anatomy
from lib.primitives.layer_importance import Change, layer_scores, lowest, mean_cosine, pooled_cosine, relative_change
from tests.conftest import CONFIGS, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")


def states(model: nn.Module, ids: torch.Tensor, **inputs) -> list[torch.Tensor]:
    """The residual stream before the first block and after every block, the last one's before the final norm."""
    found = []
    handles = [Anatomy(model).blocks[0].register_forward_pre_hook(lambda _, args, kwargs: found.append(
        args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]  # fmt: skip
    for block in Anatomy(model).blocks:
        handles.append(
            block.register_forward_hook(lambda _, inputs, out: found.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return found


def change(x: torch.Tensor, y: torch.Tensor) -> Change:
    found = Change()
    found.add(x, y)
    return found


def vectors(seed: int, tokens: int = 30, d: int = 8) -> torch.Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed)).double()


# --- scores of two sets of vectors ----------------------------------------------------------------------------------------


def test_a_block_that_does_nothing_scores_zero_and_one_that_turns_the_sign_two():
    x = vectors(0)
    assert mean_cosine(change(x, x)) == pytest.approx(0, abs=1e-15)
    assert mean_cosine(change(x, -x)) == pytest.approx(2, abs=1e-15)
    assert pooled_cosine(change(x, x)) == pytest.approx(0, abs=1e-15)
    assert pooled_cosine(change(x, -x)) == pytest.approx(0, abs=1e-15)  # this reading takes the absolute value
    assert relative_change(change(x, x)) == 0
    assert relative_change(change(x, -x)) == pytest.approx(2)


def test_scores_follow_their_formulas():
    x, y = vectors(0), vectors(1) + vectors(0)
    cosines = [float(torch.dot(a, b)) / (float(a.norm()) * float(b.norm())) for a, b in zip(x, y, strict=True)]
    assert mean_cosine(change(x, y)) == pytest.approx(1 - sum(cosines) / 30, rel=1e-12)
    assert pooled_cosine(change(x, y)) == pytest.approx(1 - abs(float((x * y).sum())) / float(x.norm() * y.norm()), rel=1e-12)
    assert relative_change(change(x, y)) == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)


def test_the_size_of_the_output_does_not_matter_to_cosines_and_batches_do_not_matter_to_any():
    x, y = vectors(0), vectors(1)
    for score in (mean_cosine, pooled_cosine):
        assert score(change(x, 7 * y)) == pytest.approx(score(change(x, y)), rel=1e-12)
    for score in (mean_cosine, pooled_cosine, relative_change):
        parts = Change()
        for start, end in ((0, 1), (1, 20), (20, 30)):
            parts.add(x[start:end], y[start:end])
        assert score(parts) == pytest.approx(score(change(x, y)), rel=1e-12)


def test_a_token_of_huge_norm_decides_the_pooled_cosine_but_not_the_mean():
    x, y = vectors(0), vectors(1)
    x[0] = y[0] = 1e4 * x[0]
    assert pooled_cosine(change(x, y)) < 1e-4
    assert mean_cosine(change(x, y)) > 0.5


def test_zero_vectors_give_numbers():
    x, y = vectors(0), vectors(1)
    x[3], y[4] = 0, 0
    x[5], y[5] = 0, 0
    rest = [i for i in range(30) if i not in (3, 4, 5)]
    expected = 1 - torch.cosine_similarity(x[rest], y[rest]).sum() / 30  # each of the three counts as the cosine 0
    assert mean_cosine(change(x, y)) == pytest.approx(float(expected), rel=1e-12)
    zero = torch.zeros_like(x)
    assert (mean_cosine(change(zero, y)), pooled_cosine(change(zero, y)), relative_change(change(zero, y))) == (1, 1, 0)


# --- choosing -------------------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_lower_index_goes():
    assert lowest([0.3, 0.1, 0.1, 0.1], 2) == [1, 2]
    assert lowest([0.1, 0.3, 0.2, 0.1], 1, protect=(0, 3)) == [2]
    assert lowest([0.5, 0.5, 0.5], 0) == []
    assert lowest([0.5, 0.4, 0.3], 3) == [0, 1, 2]


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="cannot remove 3 of 2 blocks"):
        lowest([0.1] * 4, 3, protect=(0, 3))
    with pytest.raises(ValueError, match="NaN"):
        lowest([0.1, math.nan], 1)
    with pytest.raises(ValueError, match="unknown score"):
        layer_scores(tiny("llama"), token_ids(), "norm")
    with pytest.raises(ValueError, match="unknown choice"):
        Settings(choice="best")
    for count in (-1, 3):
        with pytest.raises(ValueError, match="leave at least one"):
            chosen_blocks(tiny("llama"), token_ids(), count)
    with pytest.raises(ValueError, match="cannot remove a run"):
        angular_distances(tiny("llama"), token_ids(), 4)


def test_the_number_of_blocks_nearest_to_a_ratio():
    model = tiny("llama", num_hidden_layers=8)
    assert [blocks_for(model, ratio) for ratio in (0.0, 0.05, 0.2, 0.3, 0.99)] == [0, 0, 2, 2, 7]


# --- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_influence_is_that_of_a_plain_run(family, batches_of):
    model, ids = tiny(family), token_ids()
    found = states(model, ids)
    expected = [1 - float(torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in itertools.pairwise(found)]
    assert block_influence(model, ids) == pytest.approx(expected, rel=1e-9)
    batches_of(1)
    assert block_influence(model, ids) == pytest.approx(expected, rel=1e-9)
    norm = Anatomy(model).get(Anatomy(model).family.final_norm)
    after = 1 - float(torch.cosine_similarity(found[-2], norm(found[-1]).detach(), dim=-1).mean())
    published = block_influence(model, ids, after_norm=True)
    assert published[:-1] == pytest.approx(expected[:-1], rel=1e-9)
    assert published[-1] == pytest.approx(after, rel=1e-9)
    assert abs(after - expected[-1]) > 1e-3  # the two captures are not the same number


def test_blocks_that_do_nothing_go_first_and_removing_them_changes_nothing():
    model, ids = tiny("llama", num_hidden_layers=5), token_ids()
    with torch.no_grad():
        for i in (1, 3):
            for writer in ("self_attn.o_proj", "mlp.down_proj"):
                Anatomy(model).blocks[i].get_submodule(writer).weight.zero_()
        before = model(ids).logits
        for choice in ("one-shot", "iterative"):
            assert chosen_blocks(model, ids, 2, Settings(choice=choice)) == [1, 3]
        small = prune(model, ids, 2)
        assert (small(ids).logits - before).abs().max() < 1e-10
    assert small.config.num_hidden_layers == 3
    assert len(Anatomy(model).blocks) == 5


def test_angular_choice_is_the_run_of_least_angle():
    model, ids = tiny("opt", num_hidden_layers=6), token_ids()
    found = [h[:, -1] for h in states(model, ids)]
    angles = [float((torch.cosine_similarity(a, b).arccos() / math.pi).mean()) for a, b in zip(found, found[2:], strict=False)]
    assert angular_distances(model, ids, 2) == pytest.approx(angles, rel=1e-9)
    first = angles.index(min(angles))
    assert chosen_blocks(model, ids, 2, Settings(choice="angular")) == [first, first + 1]
    assert chosen_blocks(model, ids, 0, Settings(choice="angular")) == []


def test_iterative_choice_scores_what_is_left():
    model, ids = tiny("llama", num_hidden_layers=6), token_ids()
    left, current = list(range(6)), model
    for _ in range(3):
        scores = block_influence(current, ids)
        worst = scores.index(min(scores))
        left.pop(worst)
        current = prune(current, ids, 1)
    assert chosen_blocks(model, ids, 3, Settings(choice="iterative")) == [i for i in range(6) if i not in left]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_removes_the_same_blocks(dtype):
    model, ids = tiny("llama", num_hidden_layers=6), token_ids()
    chosen = chosen_blocks(model, ids, 3)
    assert chosen_blocks(tiny("llama", dtype, num_hidden_layers=6), ids, 3) == chosen


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("count", [0, 1, 2])
def test_shallow_models_are_stock_models_that_generate(family, count):
    model, ids = tiny(family), token_ids()
    small = prune(model, ids, count)
    assert small.config.num_hidden_layers == len(Anatomy(small).blocks) == 3 - count
    assert not getattr(small, "edits", None)
    stock = type(small)(small.config).to(torch.float64).eval()
    stock.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert (stock(ids).logits - small(ids).logits).abs().max() < 1e-6
        if count == 0:
            assert torch.equal(small(ids).logits, model(ids).logits)
    cached, plain = (small.generate(ids[:2, :8], max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
