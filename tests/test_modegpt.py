"""MoDeGPT: each module against brute force on small matrices, then the whole against counts, masked models and its own record."""

import copy
import itertools
import math
import weakref

import pytest
import torch

from lib.baselines import modegpt
from lib.baselines.modegpt import ALL, LIMIT, VALUES, Settings
from lib.compress import check_finished
from lib.methods import METHODS, make, settings_of, sweep
from lib.models.checkpoint import CheckpointError, load_checkpoint, save
from lib.primitives import narrow_heads, structured
from lib.primitives.anatomy import Anatomy
from lib.primitives.cost import count
from lib.primitives.layer_importance import layer_scores
from lib.primitives.surgery import shape_shell
from tests.conftest import relative, tiny, token_ids

EVEN = {"temperature": math.inf}
ATTENTIONS = ("none", VALUES, ALL)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


# --- the three modules -------------------------------------------------------------------------------------------------


def test_leverage_scores_are_those_of_the_formula_and_of_the_singular_vectors():
    h = random(30, 6) * torch.tensor([1, 2, 0.1, 1, 3, 1.0])
    gram = h.T @ h
    lam = 0.3 * gram.diagonal().mean()
    found = modegpt.leverage_scores(gram, 0.3)
    torch.testing.assert_close(found, (gram @ torch.linalg.inv(gram + lam * torch.eye(6))).diagonal())
    _, sigma, v = torch.linalg.svd(h, full_matrices=False)
    torch.testing.assert_close(found, (v.T.square() * sigma.square() / (sigma.square() + lam)).sum(1))
    torch.testing.assert_close(modegpt.leverage_scores(9 * gram, 0.3), found)  # neither tokens nor units matter
    assert modegpt.leverage_scores(torch.zeros(3, 3).double(), 1.0).abs().max() == 0


def test_the_refit_is_least_squares_on_the_activations():
    h, w, keep = random(40, 6) @ random(6, 6, seed=1), random(5, 6, seed=2), torch.tensor([0, 2, 3])
    found = modegpt.refitted_writer(w, h.T @ h, keep)
    torch.testing.assert_close(found, torch.linalg.lstsq(h[:, keep], h @ w.T).solution.T)
    # The loss of every choice of neurons is what is left of the outputs outside their span: no other writer does better.
    for other in itertools.combinations(range(6), 3):
        other = torch.tensor(other)
        fitted = modegpt.refitted_writer(w, h.T @ h, other)
        q, _ = torch.linalg.qr(h[:, other])
        outside = h @ w.T - q @ (q.T @ (h @ w.T))
        torch.testing.assert_close((h @ w.T - h[:, other] @ fitted.T).norm(), outside.norm())


def test_a_pulled_refit_is_ridge_regression_towards_the_dense_writer():
    h, w, keep = random(40, 6) @ random(6, 6, seed=1), random(5, 6, seed=2), torch.tensor([1, 4])
    mu = 0.7 * h.square().sum(0).mean()
    rows = torch.cat([h[:, keep], mu.sqrt() * torch.eye(2)])
    wanted = torch.cat([h @ w.T, mu.sqrt() * w.T[keep]])
    torch.testing.assert_close(modegpt.refitted_writer(w, h.T @ h, keep, pull=0.7), torch.linalg.lstsq(rows, wanted).solution.T)


def test_neurons_that_depend_on_others_go_without_loss():
    h = random(40, 4)
    h = torch.cat([h, h[:, :1] + h[:, 1:2], torch.zeros(40, 1)], dim=1)
    w, keep = random(5, 6, seed=2), torch.tensor([0, 1, 2, 3])
    assert relative(h[:, keep] @ modegpt.refitted_writer(w, h.T @ h, keep).T, h @ w.T) < 1e-10
    singular = modegpt.refitted_writer(w, h.T @ h, torch.tensor([0, 1, 2, 3, 4]))  # no inverse exists
    assert relative(h[:, :5] @ singular.T, h @ w.T) < 1e-6


def test_channels_are_scored_by_the_norms_under_the_inputs_covariance():
    """The paper's formula with the root of the covariance, for each pair of a rotary head, from squares of outputs alone."""
    x, units = random(50, 8), torch.tensor([[0, 2], [1, 3]])
    w_q, w_k = random(8, 3, 4, seed=1), random(8, 4, seed=2)  # three query heads share a key
    values, axes = torch.linalg.eigh(x.T @ x)
    root = axes * values.sqrt() @ axes.T
    squares = (torch.einsum("td,dhc->thc", x, w_q).square().sum(0), (x @ w_k).square().sum(0))
    found = modegpt.channel_scores(squares[0][None], squares[1][None], units)
    for i, pair in enumerate(units):
        together = (root @ w_q[:, :, pair].reshape(8, -1)).norm() * (root @ w_k[:, pair]).norm()
        torch.testing.assert_close(found[0, i], together)


def test_kept_channels_are_those_of_the_least_bound():
    """What the dropped columns add to QKᵀ is at most the sum of their scores, and no other choice has a smaller sum."""
    q, k = random(1, 20, 6), random(20, 6, seed=1)
    scores = modegpt.channel_scores(q.square().sum(1)[:, None], k.square().sum(0)[None], torch.arange(6)[:, None])[0]
    kept = modegpt.keep_highest(scores, 4).tolist()
    bounds = {}
    for stay in itertools.combinations(range(6), 4):
        gone = [i for i in range(6) if i not in stay]
        bounds[stay] = sum(q[0, :, i].norm() * k[:, i].norm() for i in gone)
        assert (q[0] @ k.T - q[0][:, list(stay)] @ k[:, list(stay)].T).norm() <= bounds[stay] + 1e-12
    assert tuple(kept) == min(bounds, key=bounds.get)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_values_lose_the_dropped_singular_values(k):
    v, w = random(40, 5) @ random(5, 5, seed=1), random(2 * 7, 5, seed=2)  # two query heads of width 7
    into, back = modegpt.value_maps(v.T @ v, w, k)
    assert (into.shape, back.shape) == ((k, 5), (5, k))
    product = v @ w.T
    left, sigma, right = torch.linalg.svd(product, full_matrices=False)
    found = v @ into.T @ back.T @ w.T
    torch.testing.assert_close(found, left[:, :k] * sigma[:k] @ right[:k], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close((found - product).norm(), sigma[k:].norm(), atol=1e-9, rtol=1e-9)


def test_values_that_fill_fewer_directions():
    v, w = random(40, 2) @ random(2, 5, seed=1), random(7, 5, seed=2)
    into, back = modegpt.value_maps(v.T @ v, w, 4)
    assert torch.isfinite(into).all()
    assert relative(v @ into.T @ back.T @ w.T, v @ w.T) < 1e-6


# --- how much of each block --------------------------------------------------------------------------------------------


def test_shares_follow_the_formula():
    scores = [0.5, 0.1, 0.2, 0.4]
    found = torch.tensor(modegpt.shares(scores, 0.2, 0.5, [100] * 4))
    torch.testing.assert_close(found, 4 * 0.2 * torch.softmax(-torch.tensor(scores) / 0.5, 0))
    assert modegpt.shares(scores, 0.2, math.inf, [100] * 4) == pytest.approx([0.2] * 4)


def test_shares_solve_the_problem_that_the_paper_states():
    """Of all shares with this mean, those of the formula have the least Σ share · score - ε · entropy."""
    scores, temperature = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64), 0.4
    best = torch.tensor(modegpt.shares(scores.tolist(), 0.25, temperature, [1] * 3)).double()

    def cost(share):
        return (share * scores).sum() + temperature * (share * share.log()).sum()

    for seed in range(20):
        step = random(3, seed=seed)
        assert cost(best + 1e-3 * (step - step.mean())) > cost(best)


def test_shares_are_limited_and_keep_their_mean():
    sizes = [100, 300, 50, 200]
    found = modegpt.shares([1.0, 0.0, 0.5, 0.6], 0.5, 0.1, sizes)
    assert max(found) == found[1] == LIMIT
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) == pytest.approx(0.5 * sum(sizes))
    assert found[2] / found[3] == pytest.approx(math.exp(1), rel=1e-6) or found[2] == LIMIT
    assert modegpt.shares([1.0, 0.0], 0.9, 0.1, [1, 1]) == [0.9, 0.9]


# --- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi"])
def test_the_share_of_the_blocks_is_met_to_within_a_neuron(family, attention):
    model = tiny(family, num_hidden_layers=4)
    dense, block = count(model), Anatomy(model).blocks[0]
    neuron = modegpt.unit_params(block, Anatomy(model).family.mlp)
    for ratio in (0.1, 0.25, 0.4):
        small = make("modegpt", model, token_ids(), ratio, attention=attention)
        gone = dense.decoder - count(small).decoder
        assert ratio * dense.decoder <= gone + 1e-6
        assert gone < ratio * dense.decoder + neuron


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_its_shape_is_what_is_left(attention):
    settings = Settings(attention, **EVEN)
    for family in ("llama", "opt"):
        model = tiny(family)
        [(_, small)] = modegpt.sweep(model, token_ids(), [0.3], settings)
        told = modegpt.shape(model, 0.3, settings)
        assert {n: p.shape for n, p in told.state_dict().items()} == {n: p.shape for n, p in small.state_dict().items()}
        assert all(p.is_meta for p in told.parameters())
        assert count(told) == count(small)
        assert getattr(told, "edits", None) == getattr(small, "edits", None)


def test_blocks_that_change_the_stream_keep_more():
    model, ids = tiny("llama", num_hidden_layers=4), token_ids()
    left = modegpt.plan(model, layer_scores(model, ids), 0.3, Settings(ALL))
    scores, widths = layer_scores(model, ids), [own.neurons for own in left]
    assert sorted(range(4), key=scores.__getitem__) == sorted(range(4), key=widths.__getitem__)
    assert len(set(widths)) > 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "opt", "phi"])
def test_full_heads_are_the_dense_model(family):
    """Narrow modules that keep every channel, in an order of their own and in another basis of the values."""
    model = tiny(family)
    before = logits(model)
    anatomy = Anatomy(model)
    units = narrow_heads.head_units(model.config)
    assert sorted(units.flatten().tolist()) == list(range(units.numel()))
    for block in anatomy.blocks:
        groups = block.get_submodule(narrow_heads.separate_readers(anatomy)[1]).out_features // units.numel()
        narrow_heads.narrow_queries(anatomy, block, torch.arange(len(units)).flip(0).expand(groups, -1))
        turn = random(groups, units.numel(), units.numel())
        narrow_heads.narrow_values(anatomy, block, turn, torch.linalg.inv(turn))
    assert relative(logits(model), before) < 1e-6  # norms are float32


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_narrow_queries_are_dense_ones_with_zeros(family):
    """Every group has its own channels, with their own frequencies."""
    model, dense = tiny(family), tiny(family)
    units, anatomy, masked = narrow_heads.head_units(model.config), Anatomy(model), Anatomy(dense)
    for block, other in zip(anatomy.blocks, masked.blocks, strict=True):
        names, size = narrow_heads.separate_readers(anatomy)[:2], units.numel()
        groups = block.get_submodule(names[1]).out_features // size
        kept = torch.stack([torch.randperm(len(units), generator=torch.Generator().manual_seed(g))[:2] for g in range(groups)])
        narrow_heads.narrow_queries(anatomy, block, kept)
        for name in names:
            layer = other.get_submodule(name)
            heads = layer.out_features // size
            stays = torch.zeros(heads, size, dtype=torch.bool)
            for head in range(heads):
                stays[head, units[kept[head * groups // heads]].flatten()] = True
            with torch.no_grad():
                layer.weight[~stays.flatten()] = 0
                if layer.bias is not None:
                    layer.bias[~stays.flatten()] = 0
    assert relative(logits(model), logits(dense)) < 1e-12
    assert count(model).decoder < count(dense).decoder


def test_partly_rotated_heads_keep_pairs_of_one_frequency():
    units = narrow_heads.head_units(tiny("phi").config)  # half of 8 channels are rotated
    assert units.tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]
    assert narrow_heads.head_units(tiny("opt").config).shape == (8, 1)


def test_the_block_is_cut_by_what_its_activations_say():
    """The first block's modules from recorded activations, by hand; later blocks see the dense model, too."""
    model, ids = tiny("llama", head_dim=8), token_ids()
    anatomy, seen = Anatomy(model), {}
    block = anatomy.blocks[1]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: seen.setdefault(name, []).append((x[0] if "down" in name else y).flatten(0, 1))
        )
    [(_, small)] = modegpt.sweep(model, ids, [0.3], Settings(ALL, **EVEN, damping=0))
    seen = {name: torch.cat(parts[: len(parts) // 2]).detach() for name, parts in seen.items()}  # two passes
    cut = Anatomy(small).blocks[1]
    # I.
    h, dense = seen["mlp.down_proj"], block.mlp.down_proj.weight.detach()
    gram = h.T @ h
    scores = (gram @ torch.linalg.inv(gram + gram.diagonal().mean() * torch.eye(48))).diagonal()
    keep = scores.argsort(descending=True)[: cut.mlp.down_proj.in_features].sort().values
    assert torch.equal(cut.mlp.up_proj.weight, block.mlp.up_proj.weight[keep])
    wanted = torch.linalg.lstsq(h[:, keep], h @ dense.T, driver="gelsd").solution.T
    torch.testing.assert_close(cut.mlp.down_proj.weight.detach(), wanted, rtol=1e-4, atol=1e-5)
    # II.
    q, k = seen["self_attn.q_proj"].view(-1, 2, 2, 8), seen["self_attn.k_proj"].view(-1, 2, 8)
    for group in range(2):
        score = [(q[:, group][..., [j, j + 4]].norm() * k[:, group][..., [j, j + 4]].norm()).item() for j in range(4)]
        kept = sorted(sorted(range(4), key=score.__getitem__)[1:])
        places = [p - 8 * group for p in cut.self_attn.k_proj.places.tolist() if p // 8 == group]
        assert sorted(places) == sorted(kept + [j + 4 for j in kept])
    # III.
    v, o = seen["self_attn.v_proj"].view(-1, 2, 8), block.self_attn.o_proj.weight.detach().view(32, 2, 2, 8)
    rank = cut.self_attn.v_proj.narrow.out_features // 2
    assert rank == 6
    for group in range(2):
        joint = torch.cat([o[:, group, head] for head in range(2)])
        left, sigma, right = torch.linalg.svd(v[:, group] @ joint.T, full_matrices=False)
        x = torch.cat(seen.get("x", [v[:, group]]))
        into = cut.self_attn.v_proj.narrow.weight.detach().view(2, rank, 32)[group]
        back = cut.self_attn.o_proj.narrow.weight.detach().view(32, 2, 2, rank)[:, group]
        made = (
            torch.cat([back[:, head] for head in range(2)])
            @ into
            @ torch.linalg.pinv(block.self_attn.v_proj.weight.detach().view(2, 8, 32)[group])
        )
        torch.testing.assert_close((x @ made.T), left[:, :rank] * sigma[:rank] @ right[:rank], rtol=1e-6, atol=1e-6)


def test_one_pass_scores_and_one_measures_for_all_ratios(monkeypatch):
    model, ids, rows = tiny("llama"), token_ids(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, x, y: rows.append(x[0].flatten(0, -2).shape[0]))
    assert len(list(modegpt.sweep(model, ids, [0.1, 0.2, 0.3], Settings(ALL)))) == 3
    assert sum(rows) == 2 * ids.numel()


def test_one_block_is_measured_at_a_time(monkeypatch):
    """The moments of a block are gone before those of the next are made, also for several ratios."""
    grams, measure, alive = [], modegpt.statistics, []

    def watched(*arguments):
        alive.append(sum(gram() is not None for gram in grams))
        found = measure(*arguments)
        grams.append(weakref.ref(found.neurons))
        return found

    monkeypatch.setattr(modegpt, "statistics", watched)
    assert len(list(modegpt.sweep(tiny("llama"), token_ids(), [0.1, 0.3], Settings(ALL)))) == 2
    assert alive == [0, 0, 0]


def test_cached_decoding_is_a_full_pass():
    small = make("modegpt", tiny("llama"), token_ids(), 0.3, attention=ALL)
    ids = token_ids(2, 12)
    with torch.no_grad():
        start = small(ids[:, :8], use_cache=True)
        rest = small(ids[:, 8:], past_key_values=start.past_key_values).logits
        torch.testing.assert_close(rest, small(ids).logits[:, 8:], rtol=1e-6, atol=1e-6)


# --- what can be saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_neurons_save_and_load_with_the_same_logits(tmp_path, family):
    small = make("modegpt", tiny(family), token_ids(), 0.2)
    again = load_checkpoint(save(small, None, tmp_path / "m"))
    assert torch.equal(logits(again), logits(small))


def test_narrow_heads_are_refused_before_anything_is_written_and_replay_as_they_are(tmp_path):
    small = make("modegpt", tiny("llama"), token_ids(), 0.2, attention=ALL)
    with pytest.raises(CheckpointError, match="unknown edit 'narrow-heads'"):
        save(small, None, tmp_path / "m")
    with pytest.raises(CheckpointError, match="unknown edit 'narrow-heads'"):  # what `invoke compress` asks before any work
        check_finished(METHODS["modegpt"], Settings(ALL), tiny("llama"), 0.2, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    again = shape_shell(tiny("llama"))
    known = {"structured": structured.replay, "narrow-heads": narrow_heads.replay}
    for edit in copy.deepcopy(small.edits):
        again = known[edit.pop("edit")](again, **edit)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    again.load_state_dict(small.state_dict(), assign=True)
    rotary = tiny("llama").model.rotary_emb  # its frequencies are computed, not stored
    again.model.rotary_emb = rotary
    assert torch.equal(logits(again), logits(small))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"units": [2, 2], "values": [None] * 3}, "do not fit 3 blocks"),
        ({"units": [None] * 3, "values": [0, 4, 4]}, "do not fit 3 blocks with heads of 12"),
        ({"units": [7, 2, 2], "values": [None] * 3}, "with heads of 6"),
    ],
)
def test_records_that_do_not_fit(edit, message):
    with pytest.raises(ValueError, match=message):
        narrow_heads.replay(shape_shell(tiny("llama")), **edit)


# --- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "values", "ratio", "message"),
    [
        ("llama", {}, 0.5, "leaves no neuron in a block: use a lower ratio, or cut attention too with attention=all"),
        ("llama", {"attention": ALL}, 0.999, "leaves no neuron in a block: use a lower ratio$"),
        ("gpt_neox", {"attention": VALUES}, 0.2, "gpt_neox keeps queries, keys and values in one matrix"),
        (
            "qwen3",
            {"attention": ALL},
            0.2,
            "qwen3 normalises queries and keys over all channels of a head, so none can go: narrow only the values",
        ),
        ("llama", {"attention": "some"}, 0.2, "unknown attention 'some'"),
        ("llama", {"temperature": 0}, 0.2, "temperature is 0"),
        ("llama", {"damping": -1}, 0.2, "damping is -1"),
    ],
)
def test_mistakes_are_refused_before_any_work(monkeypatch, family, values, ratio, message):
    model = tiny(family)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message):
        sweep("modegpt", model, token_ids(), [ratio], **values)


def test_a_model_with_narrow_heads_is_not_compressed_again():
    once = make("modegpt", tiny("llama"), token_ids(), 0.2, attention=ALL)
    for method in METHODS:
        with pytest.raises(ValueError, match="narrower attention heads"):
            sweep(method, once, token_ids(), [0.2])


def test_values_of_heads_with_norms_can_go():
    small = make("modegpt", tiny("qwen3"), token_ids(), 0.3, attention=VALUES)
    assert torch.isfinite(logits(small)).all()
    assert settings_of("modegpt", {"temperature": "inf"}).temperature == math.inf
