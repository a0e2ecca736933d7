"""SliceGPT: exact where the paper says exact, equal to the literal algorithm, refused where it cannot work."""

import functools

import pytest
import torch
from torch import nn

from benchmarks.literal_slicegpt import LiteralSliceGPT
from lib.papers.sliced_network import Junction, rotate_and_slice, shapes_only, slice_embedding, slice_reader, slice_writer
from lib.papers.slicegpt import (
    Rounding,
    Settings,
    constant_widths,
    decompose,
    global_axes,
    global_sweep,
    junctions,
    kept_width,
    slice_globally,
    slice_model,
    slice_without_shortcuts,
    spectra,
    stock_model,
    stock_sweep,
    sweep,
    variance_widths,
    widths_for_size,
)
from lib.primitives.anatomy import FAMILIES, Anatomy
from lib.primitives.calibration import ResidualStream
from lib.primitives.cost import count
from lib.primitives.linalg import random_rotation
from lib.suite.architectures import ARCHITECTURES
from lib.suite.architectures import meta_model as build_meta_model
from tests.conftest import CONFIGS, LAYERS, SLICEABLE, WIDTH, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
EXACT = 1e-10
SHORTCUTS = ("low-rank", "dense")
meta_model = functools.cache(build_meta_model)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def full(model):
    return [WIDTH] * Anatomy(model).junctions


def turned(matrices):
    """Junctions that are turned to given orthogonal matrices."""
    return map(Junction, matrices)


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(seed=9) if ids is None else ids).logits


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SHORTCUTS)
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SLICEABLE)
def test_no_slicing_is_the_dense_model(family, tied, epsilon, layout):
    model = tiny(family, tie_word_embeddings=tied)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = epsilon
        elif isinstance(module, nn.LayerNorm):
            module.eps = epsilon
    sliced = slice_model(model, token_ids(), 0.0, layout=layout)
    assert relative(logits(sliced), logits(model)) < EXACT


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_norm_elementwise_affine": False},
        {"enable_bias": False},
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ],
)
def test_layer_norm_models_without_gain_or_biases(settings):
    model = tiny("opt", **settings)
    assert relative(logits(slice_model(model, token_ids(), 0.0, layout="low-rank")), logits(model)) < EXACT


def test_layer_norm_without_offset():
    model = tiny("opt")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias = None
    assert relative(logits(slice_model(model, token_ids(), 0.0, layout="low-rank")), logits(model)) < EXACT


@pytest.mark.parametrize(
    "settings", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}]
)
def test_head_counts_and_biases(settings):
    model = tiny("llama", **settings)
    assert relative(logits(slice_model(model, token_ids(), 0.0)), logits(model)) < EXACT


@pytest.mark.parametrize("family", SLICEABLE)
def test_any_rotation_at_every_junction_changes_nothing(family):
    """Theorem 1 of the paper: orthogonal matrices that have nothing to do with the data, one per junction."""
    model = tiny(family)
    rotations = (random_rotation(WIDTH, generator(i)) for i in range(2 * LAYERS + 1))
    rotated = rotate_and_slice(model, turned(rotations), full(model), layout="dense")
    assert relative(logits(rotated), logits(model)) < EXACT
    with torch.no_grad():
        assert not torch.allclose(rotated.lm_head.weight, model.lm_head.weight)


def test_layer_norm_model_has_one_free_dimension():
    model = tiny("opt")
    sliced = slice_model(model, token_ids(), 1 / WIDTH, round_interval=1, slice_head=True)
    assert sliced.lm_head.in_features == WIDTH - 1
    assert relative(logits(sliced), logits(model)) < EXACT


def test_stream_of_low_rank_is_sliced_without_loss():
    model, rank = tiny("llama", tie_word_embeddings=False), 12
    basis = random_rotation(WIDTH, generator())[:, :rank]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis @ basis.T)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(basis @ basis.T @ writer.weight)
    sliced = slice_model(model, token_ids(), 0.5, round_interval=1, slice_head=True)
    assert sliced.lm_head.in_features == 16
    assert relative(logits(sliced), logits(model)) < EXACT


@pytest.mark.parametrize("slice_head", [True, False])
@pytest.mark.parametrize("level", [0.1, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_low_rank_layout_is_the_dense_layout(family, level, slice_head):
    model = tiny(family)
    both = [
        slice_model(model, token_ids(), level, layout=layout, round_interval=1, slice_head=slice_head) for layout in SHORTCUTS
    ]
    assert relative(logits(both[0]), logits(both[1])) < EXACT
    assert relative(logits(both[0]), logits(model)) > 1e-3  # slicing does something
    k = kept_width(WIDTH, level, 1)
    shortcuts = [w.shortcut for block in Anatomy(both[0]).blocks for w in block.modules() if hasattr(w, "shortcut")]
    assert [None if c is None else tuple(c.shape) for c in shortcuts[:-1]] == [(k, min(k, WIDTH - k))] * (2 * LAYERS - 1)
    assert (shortcuts[-1] is None) != slice_head


def test_no_slicing_stores_no_shortcuts():
    sliced = slice_model(tiny("llama"), token_ids(), 0.0)
    assert not [name for name, _ in sliced.named_parameters() if "shortcut" in name]


@pytest.mark.parametrize("layout", SHORTCUTS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_orientation_changes_weights_but_not_the_function(family, layout):
    model = tiny(family)
    settings = dict(layout=layout, round_interval=1)
    pca = slice_model(model, token_ids(), 0.3, **settings)
    turned = [slice_model(model, token_ids(), 0.3, orientation="random", seed=seed, **settings) for seed in (0, 0, 1)]
    for other in turned:
        assert relative(logits(other), logits(pca)) < EXACT
    tables = [Anatomy(m).get(Anatomy(m).family.embeddings[0]).weight for m in turned]
    assert torch.equal(tables[0], tables[1])
    assert not torch.allclose(tables[0], tables[2])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_float32_is_close(family):
    model = tiny(family, torch.float32)
    assert relative(logits(slice_model(model, token_ids(), 0.0, layout="low-rank")), logits(model)) < 1e-4


# --- the algorithm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("level", [0.1, 0.3, 0.5])
def test_equals_the_literal_two_evaluation_algorithm(level, tied):
    model = tiny("llama", tie_word_embeddings=tied)
    literal = LiteralSliceGPT(model, token_ids(), kept_width(WIDTH, level, 1), batch=4)
    for layout in SHORTCUTS:
        ours = slice_model(model, token_ids(), level, layout=layout, round_interval=1)
        assert relative(logits(ours), literal(token_ids(seed=9))) < 1e-8


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_calibration_runs_the_finished_network(family):
    """The projected stream through the dense blocks is the sliced model's stream: same logits on the calibration set."""
    model, ids, k = tiny(family), token_ids(), 20
    stream = ResidualStream(model, ids, batch=4)
    for _ in junctions(stream, decompose(stream), [k] * (stream.anatomy.junctions - 1) + [WIDTH]):
        pass
    anatomy = Anatomy(model)
    with torch.no_grad():
        expected = anatomy.head(anatomy.get(anatomy.family.final_norm)(stream.hidden))
    sliced = slice_model(model, ids, 1 - k / WIDTH, layout="low-rank", round_interval=1)
    assert relative(logits(sliced, ids), expected) < EXACT


@pytest.mark.parametrize("orientation", ["pca", "random"])
def test_sweep_equals_single_runs_and_leaves_the_dense_model_alone(orientation):
    model = tiny("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    levels, settings = (0.1, 0.3, 0.5), dict(layout="low-rank", round_interval=1, orientation=orientation)
    for level, sliced in sweep(model, token_ids(), levels, Settings(**settings)):
        assert torch.equal(logits(sliced), logits(slice_model(model, token_ids(), level, **settings)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_in_place_equals_out_of_place(family):
    settings = dict(layout="low-rank", round_interval=1)
    apart = slice_model(tiny(family), token_ids(), 0.25, **settings)
    model = tiny(family)
    consumed = slice_model(model, token_ids(), 0.25, inplace=True, **settings)
    assert consumed is model
    assert torch.equal(logits(consumed), logits(apart))
    # nothing of the calibration set stays behind in the model
    assert not [
        m for m in consumed.modules() if getattr(m, "residual", None) is not None or getattr(m, "extra", None) is not None
    ]


def test_same_calibration_gives_the_same_bits():
    one, two = (slice_model(tiny("llama"), token_ids(), 0.25).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_batch_size_does_not_matter():
    model, widths, found = tiny("llama"), constant_widths(tiny("llama"), 0.25), []
    for batch in (1, 7):
        stream = ResidualStream(model, token_ids(7), batch=batch)
        found.append(rotate_and_slice(model, junctions(stream, decompose(stream), widths), widths, "low-rank"))
    assert relative(logits(found[0]), logits(found[1])) < EXACT


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_fewer_tokens_than_dimensions(family):
    """Three tokens, a covariance of rank three: on those very tokens nothing is lost, elsewhere the result is finite."""
    model, ids = tiny(family), token_ids(1, 3)
    sliced = slice_model(model, ids, 0.5, layout="low-rank", round_interval=1)
    assert relative(logits(sliced, ids), logits(model, ids)) < EXACT
    assert torch.isfinite(logits(sliced)).all()


def test_error_falls_with_width_and_pca_beats_random_directions():
    errors, random_errors = [], []
    for level in (0.1, 0.3, 0.5, 0.7):
        k = kept_width(WIDTH, level, 1)
        pairs = []
        for seed in range(4):
            model = tiny("llama", seed=seed)
            rotations = (random_rotation(WIDTH, generator(seed)) for _ in range(2 * LAYERS + 1))
            blindly = rotate_and_slice(model, turned(rotations), [k] * (2 * LAYERS) + [WIDTH], "low-rank")
            for sliced in (slice_model(model, token_ids(), level, round_interval=1), blindly):
                pairs.append((logits(sliced) - logits(model)).norm() / logits(model).norm())
        errors.append(torch.stack(pairs[0::2]).mean())
        random_errors.append(torch.stack(pairs[1::2]).mean())
    assert errors == sorted(errors)
    assert all(a < 0.7 * b for a, b in zip(errors, random_errors, strict=True))


def test_normalised_signal_is_another_estimator():
    model = tiny("llama")
    raw, normalised = (slice_model(model, token_ids(), 0.25, signal=s) for s in ("raw", "normalised"))
    assert relative(logits(raw), logits(normalised)) > 1e-4
    stream = ResidualStream(model, token_ids())
    x = stream.hidden.flatten(0, 1)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    values = torch.linalg.eigvalsh(x.T @ x).flip(0)
    assert torch.allclose(decompose(stream, Settings(signal="normalised"))[0], values.clamp(min=0), atol=1e-3)


def test_gain_offset_of_gemma_style_norms():
    norm, layer = nn.Module(), nn.Linear(4, 3, bias=False, dtype=torch.float64)
    norm.weight = nn.Parameter(torch.tensor([0.5, -0.2, 0.0, 1.0], dtype=torch.float64))
    folded = slice_reader(layer, norm, torch.eye(4, dtype=torch.float64), FAMILIES["gemma3_text"])
    assert torch.allclose(folded.weight, layer.weight * torch.tensor([1.5, 0.8, 1.0, 2.0], dtype=torch.float64))


# --- a sliced model is used like any other ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SHORTCUTS)
@pytest.mark.parametrize("family", SLICEABLE)
def test_generation_with_and_without_cache(family, layout):
    sliced = slice_model(tiny(family), token_ids(), 0.25, layout=layout)
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    with_cache, without = (sliced.generate(token_ids(2), use_cache=c, **settings) for c in (True, False))
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 28)


def test_tying_cannot_come_back():
    sliced = slice_model(tiny("opt"), token_ids(), 0.25, layout="low-rank")
    expected = logits(sliced)
    sliced.tie_weights()
    assert torch.equal(logits(sliced), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_casts(dtype):
    sliced = slice_model(tiny("llama"), token_ids(), 0.25)
    expected = logits(sliced)
    assert relative(logits(sliced.to(dtype)).double(), expected) < 0.1


@pytest.mark.parametrize("layout", SHORTCUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_calibration_in_bfloat16(family, layout):
    exact = tiny(family)
    half = slice_model(tiny(family).bfloat16(), token_ids(), 0.25, layout=layout)
    assert half.dtype == torch.bfloat16
    assert relative(logits(half).double(), logits(slice_model(exact, token_ids(), 0.25, layout=layout))) < 0.15


def test_a_sliced_model_can_be_copied_after_use():
    import copy

    sliced = slice_model(tiny("opt"), token_ids(), 0.25, slice_head=True)
    expected = sliced(token_ids()).logits  # with gradients: a stored activation could not be copied
    assert torch.equal(copy.deepcopy(sliced)(token_ids()).logits, expected)


# --- tied embeddings ----------------------------------------------------------------------------------------------------


TIED = [family for family in SLICEABLE if family not in ("phi", "gpt_neox")]


@pytest.mark.parametrize("level", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("family", TIED)
def test_tied_layout_is_the_same_function_with_one_table(family, level):
    model = tiny(family, tie_word_embeddings=True)
    tied, untied = (slice_model(model, token_ids(), level, layout=layout, round_interval=1) for layout in ("tied", "low-rank"))
    assert relative(logits(tied), logits(untied)) < EXACT
    anatomy = Anatomy(tied)
    table = anatomy.get(anatomy.family.embeddings[0])
    assert anatomy.head.weight is table.weight
    assert tied.config.tie_word_embeddings
    tied.tie_weights()
    assert relative(logits(tied), logits(untied)) < EXACT
    if level:
        assert count(tied).params < count(untied).params


def test_tied_layout_needs_a_tied_model_and_a_whole_head():
    with pytest.raises(ValueError, match="shares the embedding"):
        sweep(tiny("llama", tie_word_embeddings=False), token_ids(), [0.25], Settings(layout="tied"))
    with pytest.raises(ValueError, match="at full width"):
        sweep(tiny("llama", tie_word_embeddings=True), token_ids(), [0.25], Settings(layout="tied", slice_head=True))


@pytest.mark.parametrize("family", SLICEABLE)
def test_the_layout_is_that_of_the_head_unless_it_is_given(family):
    for tied in (True, False):
        model = tiny(family, tie_word_embeddings=tied)
        usual = "tied" if tied else "low-rank"
        for cut, settings, layout in (
            (0.25, {}, usual),
            (0.25, {"slice_head": True}, "low-rank"),
            (uneven_widths(model), {}, usual),
            (uneven_widths(model, 18), {}, "low-rank"),
            (0.25, {"layout": "dense"}, "dense"),
        ):
            assert slice_model(model, token_ids(), cut, **settings).edits[0]["layout"] == layout


# --- schedules ------------------------------------------------------------------------------------------------------------


def uneven_widths(model, head=WIDTH):
    """Widths that rise and fall from junction to junction."""
    return [(24, 28, 20, 31, 16, 27)[i] for i in range(Anatomy(model).junctions - 1)] + [head]


@pytest.mark.parametrize("head", [WIDTH, 18, 30])
@pytest.mark.parametrize("layout", SHORTCUTS)
@pytest.mark.parametrize("family", SLICEABLE)
def test_any_schedule_runs_the_projected_stream(family, layout, head):
    """A width of its own at every junction, narrower and wider than its neighbours, against projections of the dense model."""
    model, ids = tiny(family), token_ids()
    widths = uneven_widths(model, head)
    stream = ResidualStream(model, ids, batch=4)
    *_, last = junctions(stream, decompose(stream), widths)
    anatomy = Anatomy(model)
    x = stream.hidden - stream.hidden.mean(-1, keepdim=True) if anatomy.family.subtracts_mean else stream.hidden
    kept = last.axes[:, :head]
    with torch.no_grad():
        expected = anatomy.head(anatomy.get(anatomy.family.final_norm)(x @ kept @ kept.T))
    sliced = slice_model(model, ids, widths, layout=layout)
    assert relative(logits(sliced, ids), expected) < EXACT
    assert sliced.edits[0]["widths"] == widths


def test_shortcuts_of_a_schedule_are_stored_in_the_smaller_form_that_exists():
    sliced = slice_model(tiny("llama"), token_ids(), uneven_widths(tiny("llama")))
    # 24 -> 28: I - CCᵀ with at most 32 - 28 columns; 28 -> 20 is narrower: stored dense; and so on; to the head: padding
    assert sliced.edits[0]["ranks"] == [4, None, 1, None, 5, 0]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_schedule_of_a_single_layer(family):
    model = tiny(family, num_hidden_layers=1)
    sliced = slice_model(model, token_ids(), [24, 30, 32], layout="low-rank")
    assert torch.isfinite(logits(sliced)).all()
    assert relative(logits(slice_model(model, token_ids(), [32, 32, 32], layout="low-rank")), logits(model)) < EXACT


def test_variance_schedule_by_hand():
    energies = torch.tensor([[8.0, 1.0, 0.5, 0.5], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert variance_widths(energies, 0.1, 1, slice_head=True) == [2, 3, 4]
    assert variance_widths(energies, 0.3, 1, slice_head=True) == [1, 2, 3]
    assert variance_widths(energies, 0.3, 2, slice_head=True) == [2, 2, 4]
    assert variance_widths(energies, 0.0, 1) == [4, 4, 4]
    assert variance_widths(energies, 0.9, 1) == [1, 1, 4]  # the head stays whole
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        variance_widths(energies, 1.0)


@pytest.mark.parametrize("layout", SHORTCUTS)
def test_schedule_for_a_size_is_counted_on_the_real_model(layout):
    model = tiny("llama", hidden_size=64)
    energies = spectra(model, token_ids())
    wanted = count(slice_model(model, token_ids(), 0.25, layout=layout, round_interval=1)).params
    widths = widths_for_size(model, energies, wanted, Settings(layout=layout, round_interval=1))
    found = count(slice_model(model, token_ids(), widths, layout=layout)).params
    assert 0.98 * wanted < found <= wanted
    with pytest.raises(ValueError, match="ask for more"):
        widths_for_size(model, energies, 1000)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("statistics", ["sliced", "dense"])
def test_a_variance_schedule_has_the_size_of_the_constant_one(family, statistics):
    """Level by level as a run of its own, with the widths that are found by hand; given widths stay as they are."""
    width = dict(hidden_size=64) | (dict(word_embed_proj_dim=64) if family == "opt" else {})
    model, settings = tiny(family, **width), dict(round_interval=1, statistics=statistics)
    given, energies = [64, 60] + [40] * (Anatomy(model).junctions - 3) + [64], spectra(model, token_ids())
    for cut, small in sweep(model, token_ids(), [0.25, given, 0.4], Settings(schedule="variance", **settings)):
        if cut is given:
            widths = given
        else:
            constant = count(slice_model(model, token_ids(), cut, round_interval=1)).params
            widths = widths_for_size(model, energies, constant, Settings(round_interval=1))
            assert 0.98 * constant < count(small).params <= constant
        assert small.edits[0]["widths"] == widths
        assert torch.equal(logits(small), logits(slice_model(model, token_ids(), widths, **settings)))


def test_widths_as_a_schedule():
    model, widths = tiny("llama"), uneven_widths(tiny("llama"))
    small = slice_model(model, token_ids(), 0.25, schedule=tuple(widths))
    assert small.edits[0]["widths"] == widths
    assert torch.equal(logits(small), logits(slice_model(model, token_ids(), widths)))


def test_bad_schedules():
    for widths in ([24, 24], [24] * 6 + [33], [0] * 6 + [32], [24.5] * 6 + [32], [True] * 6 + [32]):
        with pytest.raises(ValueError, match="as many widths"):
            sweep(tiny("llama"), token_ids(), [widths])


# --- variants ---------------------------------------------------------------------------------------------------------------


def test_dense_statistics_are_nested_and_another_estimator():
    model = tiny("llama")
    found = dict(sweep(model, token_ids(), [0.0, 0.25, 0.5], Settings(statistics="dense", round_interval=1)))
    assert relative(logits(found[0.0]), logits(model)) < EXACT
    tables = {level: m.model.embed_tokens.weight for level, m in found.items()}
    assert relative(tables[0.25][:, :16], tables[0.5]) < 1e-12
    assert relative(logits(found[0.5]), logits(slice_model(model, token_ids(), 0.5, round_interval=1))) > 1e-3


@pytest.mark.parametrize("slice_head", [True, False])
@pytest.mark.parametrize("family", SLICEABLE)
def test_compensation_gives_deleted_means_back(family, slice_head):
    model, ids = tiny(family), token_ids()
    settings = dict(layout="low-rank", slice_head=slice_head)
    sliced = slice_model(model, ids, 0.5, compensate=True, **settings)
    # the calibration carried the compensated network: same final stream
    stream = ResidualStream(model, ids, batch=4)
    widths = constant_widths(model, 0.5, slice_head=slice_head)
    *_, last = junctions(stream, decompose(stream), widths, Settings(compensate=True))
    anatomy = Anatomy(model)
    x = stream.hidden - stream.hidden.mean(-1, keepdim=True) if anatomy.family.subtracts_mean else stream.hidden
    kept = last.axes[:, : widths[-1]]
    norm = anatomy.get(anatomy.family.final_norm)
    with torch.no_grad():
        normed = norm(x @ kept @ kept.T)
        if slice_head:
            normed = normed + last.norm_shift * norm.weight
        assert relative(logits(sliced, ids), anatomy.head(normed)) < EXACT
    # what the first readers return is right on average, and was not before
    name, means = f"{anatomy.family.blocks}.0.{anatomy.family.attention.readers[0]}", {}
    plain = slice_model(model, ids, 0.5, **settings)
    for label, network in (("dense", model), ("compensated", sliced), ("plain", plain)):

        def keep(_, inputs, out, label=label):
            means[label] = out.flatten(0, -2).mean(0)

        handle = network.get_submodule(name).register_forward_hook(keep)
        logits(network, ids)
        handle.remove()
    assert relative(means["compensated"], means["dense"]) < EXACT
    assert relative(means["plain"], means["dense"]) > 1e-3


def test_compensation_is_off_by_default_and_not_for_dense_statistics():
    assert not slice_model(tiny("llama"), token_ids(), 0.25).edits[0]["compensated"]
    with pytest.raises(ValueError, match="measured on the sliced stream"):
        Settings(compensate=True, statistics="dense")


def test_dropping_shortcut_columns():
    model = tiny("llama")
    sizes, errors, whole = [], [], slice_model(model, token_ids(), 0.25)
    for limit in (0.0, 1e-3, 0.1, 2.0):
        small = slice_model(model, token_ids(), 0.25, drop_below=limit)
        ranks = small.edits[0]["ranks"]
        sizes.append(sum(rank or 0 for rank in ranks))
        errors.append(relative(logits(small), logits(whole)))
        for module in small.modules():
            if getattr(module, "shortcut", None) is not None:
                assert (module.shortcut.square().sum(0) >= limit).all()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8 * (2 * LAYERS - 1)
    assert sizes[-1] == 0
    assert errors[0] == 0
    assert errors[1] < errors[3]


@pytest.mark.parametrize("family", SLICEABLE)
def test_one_basis_is_one_projection_everywhere(family):
    model, ids, k = tiny(family), token_ids(), 24
    axes = global_axes(model, ids)
    anatomy, kept = Anatomy(model), axes[:, :k]
    stream = ResidualStream(model, ids, batch=4)

    def centred(x):
        return x - x.mean(-1, keepdim=True) if anatomy.family.subtracts_mean else x

    for block in range(LAYERS):
        for run, _ in anatomy.steps:
            stream.advance(run, block, before=lambda x: centred(x) @ kept @ kept.T)
    with torch.no_grad():
        for slice_head in (True, False):
            x = centred(stream.hidden)
            expected = anatomy.head(anatomy.get(anatomy.family.final_norm)(x @ kept @ kept.T if slice_head else x))
            assert relative(logits(slice_globally(model, axes, k, slice_head), ids), expected) < EXACT


def test_passes_in_bfloat16_change_the_axes_only():
    """The energies come close, and are not the same; whatever the axes, at level 0 the network is the dense one to float32."""
    model = tiny("llama").float()
    runs = []
    for passes in ("exact", "bfloat16"):
        stream, settings = ResidualStream(model, token_ids(), batch=4), Settings(passes=passes)
        widths = [WIDTH] * stream.anatomy.junctions
        runs.append(torch.stack([found.values for found in junctions(stream, decompose(stream), widths, settings)]))
        assert stream.hidden.dtype == torch.float32
    exact, quick = runs
    assert torch.equal(exact[0], quick[0])
    assert 1e-6 < relative(quick[1:], exact[1:]) < 1e-2
    whole = slice_model(model, token_ids(), 0, passes="bfloat16")
    assert relative(logits(whole), logits(model)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_float32_weights_are_cut_to_float32_rounding(family):
    """Large means and gains of unequal size, against the same products in float64 throughout."""
    d, k, g = 256, 192, torch.Generator().manual_seed(0)
    a, kind = random_rotation(d, g)[:, :k], FAMILIES[family]
    norm = nn.LayerNorm(d) if kind.subtracts_mean else nn.RMSNorm(d)
    norm.weight.data = torch.logspace(-2, 2, d)
    layer, table = nn.Linear(d, d, bias=False), nn.Embedding(100, d)
    layer.weight.data = torch.randn(d, d, generator=g) + 10
    table.weight.data = torch.randn(100, d, generator=g) + 10
    mean = torch.full((d, d), 1 / d, dtype=torch.float64) if kind.subtracts_mean else torch.zeros(d, d, dtype=torch.float64)
    centring, w = torch.eye(d, dtype=torch.float64) - mean, layer.weight.double()
    pairs = [
        (slice_reader(layer, norm, a, kind), w * norm.weight.double() @ a),
        (slice_writer(layer, a, kind), a.T @ centring @ w),
        (slice_embedding(table, a, kind), table.weight.double() @ centring @ a),
    ]
    for found, expected in pairs:
        assert found.weight.dtype == torch.float32
        assert relative(found.weight.double(), expected) < 5e-7


def test_coordinates_in_place_of_axes():
    """The paper's baseline: no rotation, delete the coordinates of smallest energy. It is a permutation, and loses more."""
    model = tiny("llama")
    order = global_axes(model, token_ids(), rotate=False)
    assert torch.equal(order.sum(0), torch.ones(WIDTH, dtype=torch.float64))
    assert set(order.unique().tolist()) == {0.0, 1.0}
    errors = {
        rotate: relative(logits(slice_globally(model, global_axes(model, token_ids(), rotate=rotate), 24)), logits(model))
        for rotate in (True, False)
    }
    assert errors[True] < errors[False]


def own_bases(model, level):
    return slice_without_shortcuts(model, token_ids(), level, round_interval=1)


def one_basis(model, level):
    return slice_globally(model, global_axes(model, token_ids()), kept_width(WIDTH, level, 1))


@pytest.mark.parametrize(("sweep_of", "alone"), [(stock_sweep, own_bases), (global_sweep, one_basis)])
def test_stock_sweeps_are_single_runs(sweep_of, alone):
    model, levels = tiny("llama"), [0.25, 0.0, 0.1]
    before, expected = logits(model), [logits(stock_model(alone(model, level))) for level in levels]
    made = list(sweep_of(model, token_ids(), levels, Rounding(1)))
    assert [level for level, _ in made] == levels
    for (level, small), right in zip(made, expected, strict=True):
        assert torch.equal(logits(small), right)
        assert small.config.hidden_size == kept_width(WIDTH, level, 1)
    assert torch.equal(logits(model), before)
    ((_, consumed),) = sweep_of(model, token_ids(), levels[:1], Rounding(1), inplace=True)
    assert torch.equal(logits(consumed), expected[0])


# --- used by others ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SHORTCUTS)
@pytest.mark.parametrize("family", SLICEABLE)
def test_left_padded_batches(family, layout):
    sliced = slice_model(tiny(family), token_ids(), 0.25, layout=layout)
    ids, mask = token_ids(2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = sliced.generate(ids, attention_mask=mask, **settings)
    alone = sliced.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], **settings)
    assert torch.equal(together[1, 20:], alone[0, 13:])


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        sliced = slice_model(tiny(family), token_ids(), 0.25, layout="low-rank").train()
        if checkpointing:
            sliced.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sliced.config.use_cache = False
        sliced(token_ids(3), labels=token_ids(3)).loss.backward()
        gradients.append({name: p.grad for name, p in sliced.named_parameters()})
    assert all(relative(gradients[1][name], g) < EXACT for name, g in gradients[0].items() if g.abs().max() > 0)


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_sandwich_norms_are_refused_unless_asked_for():
    """What is asked for, and what breaks without: tests/test_sandwich.py."""
    with pytest.raises(ValueError, match="sandwich"):
        slice_model(tiny("gemma3_text"), token_ids(), 0.25)


def test_embeddings_are_centred_only_for_layer_norm():
    """The published code subtracts the mean of every embedding, also for RMSNorm models: not the same function."""
    table, eye = nn.Embedding(10, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    assert torch.equal(slice_embedding(table, eye, FAMILIES["llama"]).weight, table.weight)
    centred = slice_embedding(table, eye, FAMILIES["opt"]).weight
    assert torch.allclose(centred, table.weight - table.weight.mean(-1, keepdim=True))


def test_slicing_twice_is_refused():
    with pytest.raises(ValueError, match="already sliced"):
        slice_model(slice_model(tiny("llama"), token_ids(), 0.25), token_ids(), 0.25)


def test_save_pretrained_says_why_not(tmp_path):
    with pytest.raises(NotImplementedError, match="checkpoint.save"):
        slice_model(tiny("llama"), token_ids(), 0.25).save_pretrained(tmp_path)


@pytest.mark.parametrize("sweep_of", [sweep, stock_sweep, global_sweep])
@pytest.mark.parametrize("level", [-0.1, 1.0, 1.5])
def test_levels_outside_the_range(level, sweep_of):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sweep_of(tiny("llama"), token_ids(), [0.25, level])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layout="sparse"), "low-rank, dense"),
        (dict(layout="global"), "slice_globally"),
        (dict(schedule="rising"), "constant, variance"),
        (dict(schedule=[24] * 6 + [32]), "give a word or a tuple, each part a whole number of at least 1"),
        (dict(signal="cooked"), "raw, normalised"),
        (dict(orientation="north"), "pca, random"),
        (dict(statistics="none"), "sliced, dense"),
        (dict(precision="float16"), "float64, float32"),
        (dict(output_norms="fold"), "refuse, exact, metric, fitted"),
        (dict(round_interval=0), "round_interval is 0: give a whole number of at least 1, as in round_interval=8"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
    with pytest.raises(ValueError, match=message):
        slice_model(tiny("llama"), token_ids(), 0.25, **settings)


@pytest.mark.parametrize("sweep_of", [sweep, stock_sweep, global_sweep])
def test_in_place_takes_one_level(sweep_of):
    with pytest.raises(ValueError, match="exactly one"):
        sweep_of(tiny("llama"), token_ids(), [0.1, 0.2], inplace=True)


# --- widths and counts -----------------------------------------------------------------------------------------------------


def test_widths_of_the_paper():
    assert [kept_width(4096, s) for s in (0.1, 0.2, 0.25, 0.3)] == [3680, 3272, 3072, 2864]
    assert [kept_width(768, s) for s in (0.1, 0.2, 0.25, 0.3)] == [688, 608, 576, 536]


@pytest.mark.parametrize("round_interval", [1, 8, 64])
@pytest.mark.parametrize("d", [768, 2048, 4096, 5120, 8192])
def test_widths_over_a_grid(d, round_interval):
    for hundredths in range(1, 91):
        k = kept_width(d, hundredths / 100, round_interval)
        exact = (100 - hundredths) * d // 100  # in integers
        assert k == exact - exact % round_interval
    assert kept_width(d, 0.0, round_interval) == d


def test_widths_that_binary_floats_get_wrong():
    assert int((1 - 0.8) * 5120) == 1023
    assert kept_width(5120, 0.8) == 1024
    assert kept_width(5120, 0.9) == 512
    assert kept_width(5120, 1 - 0.7) == kept_width(5120, 0.3) == 3584  # a level that was computed
    assert kept_width(4000, 0.1 * 3) == 2800


def test_nothing_left_and_no_step():
    with pytest.raises(ValueError, match="not a positive number"):
        kept_width(32, 0.5, 0)
    with pytest.raises(ValueError, match="leaves nothing"):
        kept_width(32, 0.9, 8)


def reference_count(name: str, k: int) -> int:
    """Closed form of the dense layout with an unsliced head, derived by hand from the shapes (not from the code)."""
    c = ARCHITECTURES[name]
    d, layers, v = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    shortcuts = (2 * layers - 1) * k * k + k * d
    if c["model_type"] == "phi":  # one shortcut a layer, head with bias
        f = c["intermediate_size"]
        blocks = layers * (4 * d * k + 2 * f * k + 3 * d + f + 2 * k) + (d - k) * (f + 1) + (d - k) * (d + 1)
        return v * k + blocks + (layers - 1) * k * k + k * d + v * d + v
    if c["model_type"] == "opt":
        f, p = c["ffn_dim"], c["max_position_embeddings"] + 2
        blocks = layers * (4 * d * k + 2 * f * k + 3 * d + f + 2 * k) + (d - k) * (f + 1)
        return (v + p) * k + blocks + shortcuts + v * d + v
    f = c["intermediate_size"]
    q = d
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    if "head_dim" in c:
        q, kv = (c["head_dim"] * c[f"num_{name}_heads"] for name in ("attention", "key_value"))
    return v * k + layers * k * (2 * q + 2 * kv + 3 * f) + shortcuts + (d - k) * f + v * d


@pytest.mark.parametrize("level", [0.1, 0.2, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_match_the_closed_forms(name, level):
    dense = meta_model(name)
    k = kept_width(dense.config.hidden_size, level)
    d, layers = dense.config.hidden_size, dense.config.num_hidden_layers
    published = count(shapes_only(dense, constant_widths(dense, level), "dense")).params
    head_norms = 2 * layers * dense.config.head_dim if dense.config.model_type == "qwen3" else 0
    assert published == reference_count(name, k) + head_norms
    low_rank = count(shapes_only(dense, constant_widths(dense, level), "low-rank")).params
    steps = layers if dense.config.model_type == "phi" else 2 * layers
    saved = (steps - 1) * (k * k - k * min(k, d - k)) + k * d
    assert low_rank == published - saved


@pytest.mark.parametrize(
    ("name", "level", "layout", "params"),
    [
        ("OPT-125M", 0.2, "dense", 147_250_880),
        ("OPT-1.3B", 0.25, "dense", 1_207_988_832),
        ("OPT-6.7B", 0.3, "dense", 5_410_272_400),
        ("Llama-2-7B", 0.25, "dense", 5_704_777_728),
        ("Llama-2-7B", 0.3, "dense", 5_292_914_432),
        ("Phi-2", 0.2, "dense", 2_391_772_160),
        ("Llama-2-7B", 0.25, "low-rank", 5_295_833_088),
        ("Llama-3.2-1B", 0.25, "tied", 1_027_344_384),
        ("Qwen3-0.6B", 0.25, "tied", 499_057_664 + 7_168),  # with the gains of its head norms
        ("OPT-125M", 0.2, "tied", 110_838_880),
    ],
)
def test_published_counts(name, level, layout, params):
    dense = meta_model(name)
    assert count(shapes_only(dense, constant_widths(dense, level), layout)).params == params


def test_counts_of_a_real_model_equal_those_of_its_shapes():
    model = tiny("opt")
    for layout in SHORTCUTS:
        real = count(slice_model(model, token_ids(), 0.25, layout=layout))
        with torch.device("meta"):
            import transformers

            empty = transformers.AutoModelForCausalLM.from_config(CONFIGS["opt"]())
        assert count(shapes_only(empty, constant_widths(empty, 0.25), layout)).params == real.params
