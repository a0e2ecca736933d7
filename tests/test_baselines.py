"""SparseGPT, Wanda and magnitude: equal to slow literal versions, exactly sparse, and in the order that they should have."""

import copy

import pytest
import torch
from torch import nn

from lib.baselines import magnitude, sparsegpt, wanda
from lib.baselines.magnitude import magnitude_matrix
from lib.baselines.sparsegpt import sparsegpt_matrix
from lib.baselines.wanda import wanda_matrix
from lib.models.checkpoint import export
from lib.papers.slicegpt import slice_model
from lib.primitives.anatomy import Anatomy
from lib.primitives.layerwise import block_layers
from tests.conftest import CONFIGS, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
SPARSITIES = [(2, 4), (1, 4), (3, 4), (4, 8), (2, 3), 0.5, 0.3]


def problem(rows=6, columns=24, tokens=400, seed=0, dead=()):
    """A weight matrix and strongly correlated inputs [tokens, columns] of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=g)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=g) / columns**0.5
    x = (
        torch.randn(tokens, columns, dtype=torch.float64, generator=g) @ mixing
        + 0.1 * torch.randn(tokens, 1, generator=g).double()
    )
    x *= torch.logspace(0.5, -0.5, columns, dtype=torch.float64)[torch.randperm(columns, generator=g)]
    x[:, list(dead)] = 0
    return weight, x


def output_error(weight, new, x):
    return ((weight - new) @ x.T).square().sum().item()


def damped(gram, damping=0.01):
    """The matrix that SparseGPT and GPTQ work with, as the papers' code makes it."""
    h, mean = gram.clone(), gram.diagonal().mean()
    for j in range(len(h)):
        h[j, j] = 1.0 if gram[j, j] == 0 else h[j, j]
        h[j, j] += damping * mean
    return h


def slow_sparsegpt(weight, gram, choose, damping=0.01):
    """Optimal brain surgeon, one row and one column at a time, each step with its own inverse of what is left of H.

    choose(scores by column so far, i): which columns from i on are kept, or None where nothing is to be decided at i.
    """
    h, out = damped(gram, damping), weight.clone()
    out[:, gram.diagonal() == 0] = 0
    columns = weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(columns)]
    for i in range(columns):
        scores = torch.stack([out[:, j] ** 2 / inverses[j][0, 0] for j in range(columns)], dim=1)
        decided = choose(scores, i)
        if decided is not None:
            keep[:, i : i + decided.shape[1]] = decided
        for row in range(len(out)):
            if not keep[row, i]:
                out[row, i:] -= out[row, i] / inverses[i][0, 0] * inverses[i][0]
                out[row, i] = 0
    return out


def n_of_m(n, m):
    def choose(scores, i):
        if i % m:
            return None
        kept = torch.zeros(len(scores), m, dtype=torch.bool)
        for row in range(len(scores)):
            ranked = sorted(range(m), key=lambda j: -scores[row, i + j].item())
            kept[row, ranked[:n]] = True
        return kept

    return choose


def share(fraction, block):
    def choose(scores, i):
        if i % block:
            return None
        part = scores[:, i : i + block]
        threshold = part.flatten().sort().values[int(fraction * part.numel() + 1e-9)]
        return part >= threshold

    return choose


# --- SparseGPT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (4, 8), (2, 3)])
def test_sparsegpt_is_the_slow_optimal_brain_surgeon(pattern, damping):
    weight, x = problem()
    ours = sparsegpt_matrix(weight, x.T @ x, pattern, damping)
    slow = slow_sparsegpt(weight, x.T @ x, n_of_m(*pattern), damping)
    assert torch.equal(ours == 0, slow == 0)
    assert relative(ours, slow) < 1e-8


@pytest.mark.parametrize("block", [7, 8, 24, 128])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_unstructured_sparsegpt_has_one_threshold_per_block_of_columns(fraction, block):
    weight, x = problem()
    ours = sparsegpt_matrix(weight, x.T @ x, fraction, block=block)
    slow = slow_sparsegpt(weight, x.T @ x, share(fraction, block))
    assert torch.equal(ours == 0, slow == 0)
    assert relative(ours, slow) < 1e-8
    for part in ours.split(block, dim=1):
        assert (part == 0).sum() == int(fraction * part.numel() + 1e-9)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (2, 3), (11, 12)])
def test_block_size_only_changes_the_speed(pattern):
    weight, x = problem(columns=264)
    results = [sparsegpt_matrix(weight, x.T @ x, pattern, block=block) for block in (1, 5, 12, 100, 128, 1000)]
    for other in results[1:]:
        assert torch.equal(other == 0, results[0] == 0)
        assert relative(other, results[0]) < 1e-10


def test_what_stays_is_the_least_squares_answer_when_one_column_goes():
    """Dropping the first column alone: the exact answer is a regression of the outputs on the other columns."""
    weight, x = problem(rows=40, columns=4)
    x[:, 0] *= 0.1  # often the cheapest to lose
    pruned = sparsegpt_matrix(weight, x.T @ x, (3, 4), damping=0.0)
    first = pruned[:, 0] == 0
    rest = torch.linalg.lstsq(x[:, 1:], x @ weight[first].T).solution.T
    assert first.sum() > 3
    assert relative(pruned[first][:, 1:], rest) < 1e-8


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_update_repairs_part_of_the_damage(sparsity):
    weight, x = problem()
    pruned = sparsegpt_matrix(weight, x.T @ x, sparsity)
    masked_only = weight * (pruned != 0)
    assert output_error(weight, pruned, x) < 0.95 * output_error(weight, masked_only, x)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparsegpt_beats_wanda_beats_magnitude_on_correlated_inputs(sparsity):
    errors = torch.zeros(3)
    for seed in range(5):
        weight, x = problem(rows=32, seed=seed)
        gram = x.T @ x
        news = (
            sparsegpt_matrix(weight, gram, sparsity),
            wanda_matrix(weight, gram.diagonal(), sparsity),
            magnitude_matrix(weight, sparsity),
        )
        errors += torch.tensor([output_error(weight, new, x) / output_error(weight, 0 * weight, x) for new in news])
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[2]


def test_dead_inputs_lose_their_weights_first():
    weight, x = problem(dead=(0, 5, 13))
    pruned = sparsegpt_matrix(weight, x.T @ x, (2, 4))
    assert not pruned[:, [0, 5, 13]].any()
    assert relative(pruned, slow_sparsegpt(weight, x.T @ x, n_of_m(2, 4))) < 1e-8
    assert ((pruned.view(6, 6, 4) != 0).sum(-1) == 2).all()  # each group with a dead input still keeps two others
    assert not wanda_matrix(weight, x.square().sum(0), (2, 4))[:, [0, 5, 13]].any()
    assert not sparsegpt_matrix(weight, torch.zeros(24, 24, dtype=torch.float64), (2, 4)).any()  # nothing ever came in


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_channels(tokens):
    weight, x = problem(tokens=tokens)
    pruned = sparsegpt_matrix(weight, x.T @ x)
    assert relative(pruned, slow_sparsegpt(weight, x.T @ x, n_of_m(2, 4))) < 1e-8
    assert output_error(weight, pruned, x) < 0.1 * output_error(weight, weight * (pruned != 0), x)
    with pytest.raises(ValueError, match="more calibration tokens"):
        sparsegpt_matrix(weight, x.T @ x, damping=0.0)


def test_scale_of_the_gram_does_not_matter():
    weight, x = problem(dead=(3,))
    one, other = (sparsegpt_matrix(weight, scale * x.T @ x) for scale in (1.0, 1e-6))
    assert relative(one, other) < 1e-10


def test_broken_gram_is_refused():
    weight, x = problem()
    with pytest.raises(ValueError, match="NaN or infinity"):
        sparsegpt_matrix(weight, x.T @ x * float("nan"))


# --- the masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (2, 3), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_n_of_every_m_stay(dtype, pattern):
    weight, x = problem()
    gram, weight = x.T @ x, weight.to(dtype)
    before = weight.clone()
    for new in (
        sparsegpt_matrix(weight, gram, pattern),
        wanda_matrix(weight, gram.diagonal(), pattern),
        magnitude_matrix(weight, pattern),
    ):
        assert new.dtype == dtype
        assert ((new.view(6, -1, pattern[1]) != 0).sum(-1) == pattern[0]).all()
    assert torch.equal(weight, before)


def slow_wanda(weight, x, sparsity):
    out = weight.clone()
    norms = [sum(v**2 for v in column.tolist()) ** 0.5 for column in x.T]
    for row in out:
        scores = [abs(w) * norm for w, norm in zip(row.tolist(), norms, strict=True)]
        n, m = sparsity if isinstance(sparsity, tuple) else (None, len(scores))
        removed = m - n if n else int(sparsity * m + 1e-9)
        for start in range(0, len(scores), m):
            for j in sorted(range(start, start + m), key=scores.__getitem__)[:removed]:
                row[j] = 0
    return out


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_wanda_is_the_literal_loop_over_rows(sparsity):
    weight, x = problem()
    assert torch.equal(wanda_matrix(weight, x.square().sum(0), sparsity), slow_wanda(weight, x, sparsity))
    assert torch.equal(magnitude_matrix(weight, (2, 4)), slow_wanda(weight, torch.ones(1, 24, dtype=torch.float64), (2, 4)))


def test_rows_compete_alone_in_wanda_and_together_in_magnitude():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert wanda_matrix(weight, torch.ones(4), 0.5).tolist() == [[0, 0, 3, 4], [0, 0, 30, 40]]
    assert magnitude_matrix(weight, 0.5).tolist() == [[0, 0, 0, 0], [10, 20, 30, 40]]


def test_of_equal_scores_the_earlier_stays():
    weight = torch.ones(3, 8)
    assert magnitude_matrix(weight, (2, 4)).tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 3
    assert wanda_matrix(weight, torch.ones(8), 0.25).tolist() == [[1] * 6 + [0] * 2] * 3


def test_shares_are_exact_where_binary_floats_are_not():
    weight = torch.arange(1.0, 101.0)[None]
    assert int(0.29 * 100) == 28
    assert (wanda_matrix(weight, torch.ones(100), 0.29) == 0).sum() == 29


@pytest.mark.parametrize("prune", [sparsegpt_matrix, wanda_matrix, lambda w, _, s: magnitude_matrix(w, s)])
@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ((5, 4), "no pattern 5:4"),
        ((0, 4), "no pattern 0:4"),
        ((2, 5), "24 is not divisible by 5"),
        (1.0, r"\[0, 1\)"),
        (-0.5, r"\[0, 1\)"),
        (50, r"\[0, 1\)"),
        ("2:4", "a pair like"),
        ((0.5, 4), "a pair like"),
    ],
)
def test_sparsities_that_cannot_be(prune, sparsity, message):
    weight, x = problem()
    with pytest.raises(ValueError, match=message):
        prune(weight, x.T @ x if prune is sparsegpt_matrix else x.square().sum(0), sparsity)


# --- whole models ---------------------------------------------------------------------------------------------------------

RIVALS = {
    "sparsegpt": sparsegpt.prune,
    "wanda": wanda.prune,
    "magnitude": lambda model, ids, sparsity=(2, 4), inplace=False: magnitude.prune(model, sparsity, inplace=inplace),
}


def block_linears(model):
    return {name: m for name, m in Anatomy(model).blocks.named_modules() if isinstance(m, nn.Linear)}


def inputs_in_the_model(model, layers, ids):
    """What every layer of {name: layer} gets when the whole model runs: {name: [tokens, in]}."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: x[0].flatten(0, -2)}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def literal_rebuild(model, ids, core):
    """For each block run the whole model, record the inputs of the block's layers, and change all of them in place."""
    model = copy.deepcopy(model)
    for block in Anatomy(model).blocks:
        layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        seen = inputs_in_the_model(model, layers, ids)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(core(layer.weight.clone(), seen[name]))
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_sparsegpt_model_equals_hooks_on_the_whole_model(family):
    model = tiny(family)
    pruned = sparsegpt.prune(model, token_ids())
    literal = literal_rebuild(model, token_ids(), lambda w, x: slow_sparsegpt(w, x.T @ x, n_of_m(2, 4)))
    ours, theirs = block_linears(pruned), block_linears(literal)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].weight == 0, theirs[name].weight == 0)
        assert relative(ours[name].weight, theirs[name].weight) < 1e-7


@pytest.mark.parametrize("sparsity", [(2, 4), 0.5])
@pytest.mark.parametrize("family", CONFIGS)
def test_wanda_model_equals_hooks_on_the_whole_model(family, sparsity):
    model = tiny(family)
    pruned = wanda.prune(model, token_ids(), sparsity)
    literal = literal_rebuild(model, token_ids(), lambda w, x: slow_wanda(w, x, sparsity))
    for name, layer in block_linears(pruned).items():
        assert torch.equal(layer.weight, block_linears(literal)[name].weight)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("family", CONFIGS)
def test_only_the_matrices_of_the_blocks_change(family, rival):
    model = tiny(family, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {}))
    before = copy.deepcopy(model.state_dict())
    pruned = RIVALS[rival](model, token_ids())
    matrices = {id(layer.weight) for layer in block_linears(pruned).values()}
    for name, value in pruned.state_dict(keep_vars=True).items():
        if id(value) in matrices:
            assert ((value.view(len(value), -1, 4) != 0).sum(-1) == 2).all(), name
        else:
            assert torch.equal(value, before[name]), name
    assert len(matrices) == sum(1 for _ in block_layers(model)) > 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("rival", RIVALS)
def test_in_place_equals_out_of_place(rival):
    model = tiny("phi")
    apart = RIVALS[rival](model, token_ids())
    consumed = RIVALS[rival](model, token_ids(), inplace=True)
    assert consumed is model
    assert all(torch.equal(a, b) for a, b in zip(apart.parameters(), consumed.parameters(), strict=True))


@pytest.mark.parametrize("rival", RIVALS)
def test_pruned_model_is_a_stock_model(rival, tmp_path):
    import transformers

    pruned = RIVALS[rival](tiny("opt", torch.float32), token_ids())
    assert pruned.config.tie_word_embeddings
    folder = export(pruned, None, tmp_path / "pruned")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, pruned(token_ids()).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_half_precision_models(family):
    model = tiny(family).bfloat16()
    for rival in RIVALS.values():
        pruned = rival(model, token_ids())
        assert pruned.dtype == torch.bfloat16
        assert torch.isfinite(pruned(token_ids()).logits).all()


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("sparsity", "message"), [((2, 5), "divisible by 5"), ((3, 2), "no pattern"), (1.5, r"\[0, 1\)")])
def test_bad_sparsity_is_refused_before_any_work(rival, sparsity, message):
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))  # work would end in another error
    with pytest.raises(ValueError, match=message):
        RIVALS[rival](model, token_ids(), sparsity)


@pytest.mark.parametrize("rival", RIVALS)
def test_edited_models_are_refused(rival):
    with pytest.raises(ValueError, match="block 0 self_attn.o_proj is a ShortcutWriter.*dense model"):
        RIVALS[rival](slice_model(tiny("llama"), token_ids(), 0.25), token_ids())


def test_repair_and_real_inputs_pay_off_on_the_embedded_model():
    from lib.evaluation.perplexity import perplexity
    from lib.evaluation.text import calibration_text, load_corpus, sample_blocks, tokens_of
    from lib.models.load import load

    model, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(calibration_text("wiki-a"), tokenizer, 8, 256, torch.Generator().manual_seed(0), "rows")
    stream = tokens_of(load_corpus("wiki-a", "test"), tokenizer)
    found = [perplexity(prune(model, ids), stream, 256, 16).perplexity for prune in RIVALS.values()]
    assert found[0] < 0.95 * found[1] < found[1] < found[2]
