"""Gradient scores: against autograd and finite differences, freed or kept, and refused where they would lie."""

import pytest
import torch

from lib.primitives.anatomy import half_names
from lib.primitives.gradients import VIEWS, Passes, each_gradient, feature_modules, mean_singular_value, summed
from lib.primitives.losses import LOSSES
from tests.conftest import relative, tiny, token_ids

BOTH = ("refer", "snip")


def mlp_names(model):
    return [name for part in half_names(model) for name in part]


def all_gradients(model, ids, scalar, names):
    """Plain autograd of `scalar(model, ids)`, with everything kept."""
    weights = [model.get_submodule(name).weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    return dict(zip(names, torch.autograd.grad(scalar(model, ids), weights), strict=True))


def feature_scalar(features, matrices):
    """ΣF by plain autograd: `matrices(y [b, t, c])` gives the matrices whose mean singular values are added."""

    def scalar(model, ids):
        found = []
        hooks = [m.register_forward_hook(lambda _, i, out: found.append(out)) for m in feature_modules(model, features)]
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return sum(torch.linalg.svdvals(m).mean() for y in found for m in matrices(y.reshape(*ids.shape, -1)))

    return scalar


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi"])
def test_loss_gradients_are_those_of_the_models_own_loss(family):
    model, ids = tiny(family), token_ids(3, 12)
    names = mlp_names(model)
    expected = all_gradients(model, ids, lambda m, x: 3 * m(x, labels=x).loss, names)
    found = summed(model, ids, names)["snip"]
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        assert relative(found[name], weight * expected[name]) < 1e-5  # transformers computes its loss in float32
    together = summed(model, ids, names, batch=3)["snip"]
    assert all(relative(found[name], together[name]) < 1e-10 for name in names)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradients_are_finite_differences(loss, exact_norms):
    model, ids = tiny("llama"), token_ids(2, 10)
    names = mlp_names(model)
    found = summed(model, ids, names, loss=loss)["snip"]
    step = 1e-5
    for name in names[:4]:
        weight = model.get_submodule(name).weight.data
        row, column = divmod(int(found[name].abs().argmax()), weight.shape[1])
        values = []
        for sign in (1, -2):
            weight[row, column] += sign * step
            values.append(LOSSES[loss](model(ids).logits.detach(), ids).item())
        weight[row, column] += step
        slope = (values[0] - values[1]) / (2 * step)
        assert found[name][row, column].item() == pytest.approx((slope * weight[row, column]).item(), rel=1e-6)


def test_last_unshifted_is_the_last_token_predicted_from_itself():
    logits, ids = torch.randn(2, 5, 7, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    chosen = logits[:, -1].log_softmax(-1)[torch.arange(2), ids[:, -1]]
    assert LOSSES["last_unshifted"](logits, ids).item() == pytest.approx(-chosen.sum().item())
    assert LOSSES["lm_shift"](logits, ids).item() == pytest.approx(
        -sum(logits[b, t].log_softmax(-1)[ids[b, t + 1]].item() / 4 for b in range(2) for t in range(4))
    )


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("features", ["projections", "mlp", "block"])
@pytest.mark.parametrize(
    ("view", "matrices"),
    [
        ("flat", lambda y: [one.reshape(1, -1) for one in y]),
        ("token", lambda y: list(y)),
        ("batch", lambda y: [y.flatten(1)]),
    ],
)
def test_refer_gradients_are_those_of_svdvals(family, features, view, matrices):
    model, ids = tiny(family), token_ids(3, 12)
    names = mlp_names(model)
    expected = all_gradients(model, ids, feature_scalar(features, matrices), names)
    found = summed(model, ids, names, scores=("refer",), features=features, view=view, batch=3)["refer"]
    for name in names:
        assert relative(found[name], model.get_submodule(name).weight.detach() * expected[name]) < 1e-8


def test_all_features_hook_more_than_the_blocks_and_give_finite_gradients():
    model, ids = tiny("llama"), token_ids(2, 8)
    assert len(feature_modules(model, "all")) > 3 * len(feature_modules(model, "projections"))
    names = mlp_names(model)
    everything = summed(model, ids, names, scores=("refer",), features="all")["refer"]
    some = summed(model, ids, names, scores=("refer",))["refer"]
    assert all(torch.isfinite(everything[name]).all() and not torch.allclose(everything[name], some[name]) for name in names)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_mean_singular_value_and_its_gradient(shape):
    y = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    value = mean_singular_value(y)
    assert value.item() == pytest.approx(torch.linalg.svdvals(y).mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, y)
    (expected,) = torch.autograd.grad(torch.linalg.svdvals(y).mean(), y)
    assert relative(gradient, expected) < 1e-9


def test_repeated_singular_values_have_a_stable_gradient():
    """The gradient of the nuclear norm is UVᵀ, however many singular values coincide."""
    left = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64))[0]
    for sigma in ([2.0] * 6, [3.0, 3, 3, 1, 1, 1], [1.0, 1 + 1e-14, 1, 1, 1, 5]):
        y = (left * torch.tensor(sigma, dtype=torch.float64) @ right.T).requires_grad_()
        (gradient,) = torch.autograd.grad(mean_singular_value(y), y)
        assert relative(gradient, left @ right.T / 6) < 1e-9


def test_missing_rank_gets_no_gradient_and_no_nan():
    flat = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 8)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_singular_value(flat), flat)
    assert relative(gradient, flat.detach() / flat.detach().norm() / 4) < 1e-6
    zero = torch.zeros(4, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(mean_singular_value(zero), zero)
    assert (gradient == 0).all()


@pytest.mark.parametrize("view", VIEWS)
def test_checkpointing_changes_nothing(view):
    model, ids = tiny("llama"), token_ids(2, 10)
    names = mlp_names(model)
    plain = summed(model, ids, names, scores=BOTH, view=view, batch=2)
    again = summed(model, ids, names, scores=BOTH, view=view, batch=2, checkpointing=True)
    for score in BOTH:
        assert all(torch.equal(plain[score][name], again[score][name]) for name in names)
    assert "forward" not in vars(model.model.layers[0])


def test_products():
    model, ids = tiny("llama"), token_ids(3, 9)
    names = mlp_names(model)
    single = [summed(model, ids[i : i + 1], names)["snip"] for i in range(3)]
    absolute, squared = (summed(model, ids, names, product)["snip"] for product in ("absolute", "squared"))
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        assert relative(absolute[name], sum(one[name].abs() for one in single)) < 1e-12
        assert relative(squared[name] * weight.square(), sum(one[name].square() for one in single)) < 1e-12


def test_no_gradient_is_left_and_what_was_there_comes_back():
    model, ids = tiny("llama"), token_ids(2, 8)
    names = mlp_names(model)
    first, other = model.get_submodule(names[0]).weight, model.lm_head.weight
    first.grad, kept = torch.ones_like(first), []
    other.requires_grad_(False)

    def take(score, name, weight, gradient):
        kept.append(sum(p.grad is not None for p in model.parameters()))

    before = {n: p.requires_grad for n, p in model.named_parameters()}
    each_gradient(model, ids, names, take, Passes(scores=BOTH))
    assert len(kept) == 2 * 2 * len(names)
    assert set(kept) == {0}  # never a second gradient beside the one in use
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert (first.grad == 1).all()
    assert other.grad is None


def test_overflow_says_what_to_do():
    model, ids = tiny("llama", torch.float16), token_ids(1, 8)
    names = mlp_names(model)
    with torch.no_grad():
        model.get_submodule(names[0]).weight.mul_(1000)
        model.get_submodule(names[1]).weight.mul_(1000)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        summed(model, ids, names, scores=BOTH)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_is_close_to_float32():
    model, ids = tiny("llama", torch.float32), token_ids(2, 12)
    names = mlp_names(model)
    exact = torch.cat([x.flatten() for x in summed(model, ids, names)["snip"].values()])
    rough = torch.cat([x.flatten() for x in summed(model.bfloat16(), ids, names)["snip"].values()])
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rough, 0) > 0.98


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (token_ids(2, 1), {}, "at least 2 tokens"),
        (token_ids(2, 8)[:0], {}, "not empty"),
        (token_ids(2, 8), {"scores": ("magnitude",)}, "unknown score"),
        (token_ids(2, 8), {"scores": ()}, "no score"),
        (token_ids(2, 8), {"loss": "mse"}, "unknown loss"),
        (token_ids(2, 8), {"view": "tokens"}, "unknown view"),
        (token_ids(2, 8), {"scores": ("refer",), "features": "heads"}, "unknown features"),
        (token_ids(2, 8), {"batch": 0}, "at least 1"),
    ],
)
def test_bad_arguments(ids, settings, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        summed(model, ids, mlp_names(model)[:1], **settings)
    with pytest.raises(ValueError, match="unknown product"):
        summed(model, token_ids(2, 8), mlp_names(model)[:1], "cubed")
