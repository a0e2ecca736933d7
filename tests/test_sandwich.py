"""SliceGPT on sandwich norms (Gemma 3): three extensions, what each is exactly, and what a plain folding gets wrong."""

import json

import pytest
import torch

import tasks
from lib.models.checkpoint import save
from lib.models.load import load
from lib.papers.sliced_network import OUTPUT_NORMS, Junction, MetricNorm, NormFit, rotate_and_slice, shapes_only
from lib.papers.slicegpt import (
    Settings,
    constant_widths,
    decompose,
    fit_norm,
    junctions,
    slice_globally,
    slice_model,
    sweep,
    undo_by_regression,
)
from lib.primitives.anatomy import Anatomy
from lib.primitives.calibration import ResidualStream
from lib.primitives.cost import count
from lib.primitives.linalg import random_rotation
from tests.conftest import LAYERS, WIDTH, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
EXACT = 1e-10
EXTENSIONS = OUTPUT_NORMS[1:]
LAYOUTS = ("low-rank", "dense", "tied")


def gemma(**settings):
    """Two kinds of attention, a table scaled by √d and shared with the head; gains 1 + w of random size, none near zero."""
    epsilon = 1e-3  # large enough to show in the wrong place
    model = tiny("gemma3_text", **dict(tie_word_embeddings=True, rms_norm_eps=epsilon) | settings)
    model.model.embed_tokens.embed_scale.fill_(WIDTH**0.5)  # which was made in float32, before the model was cast
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and len(module.weight) == WIDTH:
            size = 0.3 + 2 * torch.rand(WIDTH, generator=generator, dtype=torch.float64)
            sign = torch.where(torch.rand(WIDTH, generator=generator) < 0.2, -1.0, 1.0)
            module.weight.data.copy_(size * sign - 1)
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(seed=9) if ids is None else ids).logits


def rotations(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (Junction(random_rotation(WIDTH, generator)) for _ in range(2 * LAYERS + 1))


def full(model):
    return [WIDTH] * Anatomy(model).junctions


# --- exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_norms", EXTENSIONS)
def test_no_slicing_is_the_dense_model(output_norms, layout):
    model = gemma()
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert model.model.embed_tokens.embed_scale > 5
    sliced = slice_model(model, token_ids(), 0.0, layout=layout, output_norms=output_norms)
    assert relative(logits(sliced), logits(model)) < EXACT


@pytest.mark.parametrize("layout", ["low-rank", "dense"])
@pytest.mark.parametrize("output_norms", EXTENSIONS)
def test_any_rotation_at_every_junction_changes_nothing(output_norms, layout):
    model = gemma(tie_word_embeddings=False)
    rotated = rotate_and_slice(model, rotations(), full(model), layout, output_norms=output_norms)
    assert relative(logits(rotated), logits(model)) < EXACT
    assert not torch.allclose(rotated.lm_head.weight, model.lm_head.weight)


def test_the_norm_of_the_rotated_vector_is_another_one():
    """What folding the gain and keeping the rotated vector's own rms does without any slicing: right only for equal gains."""
    errors = []
    for equal in (True, False):
        model = gemma()
        for layer in model.model.layers if equal else ():
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.data.zero_()
        naive = rotate_and_slice(model, rotations(), full(model), "dense", output_norms="metric")
        for module in naive.modules():
            if isinstance(module, MetricNorm):
                module.root.data.copy_(torch.eye(WIDTH, dtype=torch.float64) / WIDTH**0.5)
        errors.append(relative(logits(naive), logits(model)))
    assert errors[0] < EXACT
    assert errors[1] > 0.05


# --- sliced -------------------------------------------------------------------------------------------------------------


def projected_logits(model, ids, widths):
    """The dense model with its stream projected to the principal axes at every junction, written without the library's walk.

    Hooks on the norms that begin a half replace the stream that they and the residual see; the axes are those of `junctions`.
    """
    found = list(junctions(ResidualStream(model, ids, batch=4), decompose(ResidualStream(model, ids, batch=4)), widths))
    projections = [j.axes[:, :k] @ j.axes[:, :k].T for j, k in zip(found, widths, strict=True)]
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    causal = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])[None]
    for i, layer in enumerate(model.model.layers):
        sliding = model.config.layer_types[i] == "sliding_attention"
        allowed = (causal >= 0) & (causal < model.config.sliding_window) if sliding else causal >= 0
        angles = model.model.rotary_emb(x, positions, model.config.layer_types[i])
        mask = torch.where(allowed, 0.0, -1e30).to(x)[None, None].expand(len(ids), 1, -1, -1)
        x = x @ projections[2 * i]
        z = layer.self_attn(layer.input_layernorm(x), position_embeddings=angles, attention_mask=mask)[0]
        x = (x + layer.post_attention_layernorm(z)) @ projections[2 * i + 1]
        x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return model.lm_head(model.model.norm(x @ projections[-1]))


@pytest.mark.parametrize("head", [WIDTH, 27])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_is_the_projected_dense_model(layout, head):
    if layout == "tied" and head != WIDTH:
        pytest.skip("a tied head stays whole")
    model, ids = gemma(), token_ids()
    widths = [24, 28, 20, 31, 16, 27, head]
    sliced = slice_model(model, ids, widths, layout=layout, output_norms="exact")
    with torch.no_grad():
        assert relative(logits(model, ids), projected_logits(model, ids, full(model))) < EXACT  # the reference itself
        expected = projected_logits(model, ids, widths)
    assert relative(logits(sliced, ids), expected) < EXACT
    assert relative(logits(sliced, ids), logits(model, ids)) > 1e-3
    assert sliced.edits[0]["norm_errors"] == [0.0] * (2 * LAYERS)


@pytest.mark.parametrize("slice_head", [True, False])
@pytest.mark.parametrize("layout", ["low-rank", "dense"])
@pytest.mark.parametrize("output_norms", EXTENSIONS)
def test_calibration_runs_the_finished_network(output_norms, layout, slice_head):
    model, ids = gemma(), token_ids()
    settings = dict(compensate=True, output_norms=output_norms)
    sliced = slice_model(model, ids, 0.25, layout=layout, slice_head=slice_head, **settings)
    stream = ResidualStream(model, ids, batch=4)
    widths = constant_widths(model, 0.25, slice_head=slice_head)
    *_, last = junctions(stream, decompose(stream), widths, Settings(**settings))
    kept = last.axes[:, : widths[-1]]
    gain = 1 + model.model.norm.weight
    shift = last.norm_shift * gain if slice_head else 0
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(stream.hidden @ kept @ kept.T) + shift)
    assert relative(logits(sliced, ids), expected) < EXACT


def test_layouts_orientations_and_batches_are_one_function():
    model, ids = gemma(), token_ids()
    settings = dict(output_norms="metric", round_interval=1)
    first = slice_model(model, ids, 0.3, layout="low-rank", **settings)
    for more in (dict(layout="dense"), dict(layout="tied"), dict(layout="low-rank", orientation="random", seed=1)):
        assert relative(logits(slice_model(model, ids, 0.3, **settings | more)), logits(first)) < 1e-9
    stream, widths = ResidualStream(model, ids, batch=1), first.edits[0]["widths"]
    found = junctions(stream, decompose(stream), widths, Settings(**settings))
    singly = rotate_and_slice(model, found, widths, "low-rank", output_norms="metric")
    assert relative(logits(singly), logits(first)) < 1e-9


# --- the estimate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_norms", ["metric", "fitted"])
def test_reported_errors_against_brute_force(output_norms):
    """Inputs and outputs of the finished network's own modules, against the dense weights that they were cut from."""
    model, ids = gemma(), token_ids()
    sliced = slice_model(model, ids, 0.25, output_norms=output_norms, slice_head=True)
    seen = {}
    for i, layer in enumerate(sliced.model.layers):
        for name in ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm", "post_feedforward_layernorm"):
            layer.get_submodule(name).register_forward_hook(
                lambda _, inputs, out, key=(i, name): seen.__setitem__(key, (inputs[0], out))
            )
    logits(sliced, ids)
    errors = []
    for i, layer in enumerate(model.model.layers):
        for writer, name in (("self_attn.o_proj", "post_attention_layernorm"), ("mlp.down_proj", "post_feedforward_layernorm")):
            norm = sliced.model.layers[i].get_submodule(name).linear
            y = seen[i, writer][0] @ layer.get_submodule(writer).weight.T  # what the dense writer would have written
            true = y.square().mean(-1) + layer.get_submodule(name).eps
            folded = seen[i, writer][1]
            with torch.no_grad():
                estimated = (folded.square().sum(-1) / norm(folded).square().sum(-1)).flatten()
            relative_errors = estimated / true.flatten() - 1
            errors.append(relative_errors.square().mean().sqrt().item())
    assert sliced.edits[0]["norm_errors"] == pytest.approx(errors, rel=1e-8)
    assert min(errors) > 1e-3
    whole_head = slice_model(model, ids, 0.25, layout="low-rank", output_norms=output_norms)
    assert whole_head.edits[0]["norm_errors"] == pytest.approx([*errors[:-1], 0.0], rel=1e-8)  # nothing deleted at the last


def test_metric_is_the_quadratic_form():
    generator = torch.Generator().manual_seed(2)
    gain = 0.5 + torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    b = random_rotation(WIDTH, generator)[:, :20]
    norm = MetricNorm(b, gain, 1e-3, NormFit(0.04, 0.3), like=b)
    y = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    form = b.T @ torch.diag(gain**-2) @ b
    energy = torch.stack([0.04 * row @ form @ row + 0.3 + 1e-3 for row in y])
    assert relative(norm(y), y / energy.sqrt()[:, None]) < 1e-12


def test_fit_is_the_best_of_all_that_are_not_negative():
    generator = torch.Generator().manual_seed(3)
    for case in range(12):
        left = torch.rand(50, generator=generator, dtype=torch.float64) * 10
        energy = (case % 4 - 1.5) * 0.2 * left + torch.rand(50, generator=generator, dtype=torch.float64) + (0, 2, 4)[case % 3]
        energy = energy.abs()
        fit = fit_norm(energy, left, 1e-3)

        def error(slope, intercept, energy=energy, left=left):
            return ((slope * left + intercept - energy) / (energy + 1e-3)).square().mean(-1).sqrt()

        assert fit.slope >= 0
        assert fit.intercept >= 0
        assert fit.error == pytest.approx(error(fit.slope, fit.intercept).item(), rel=1e-10)
        grid = torch.linspace(0, 2, 201, dtype=torch.float64)
        assert fit.error <= error(grid[:, None, None], 3 * grid[None, :, None]).min() + 1e-12
    exact = fit_norm(left / 8, left, 1e-3)
    assert (exact.slope, exact.intercept, exact.error) == pytest.approx((1 / 8, 0, 0), abs=1e-10)
    assert fit_norm(torch.zeros(5), torch.zeros(5), 1e-6).error == 0


def test_regression_is_least_squares_and_undoes_the_gain():
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(90, WIDTH, generator=generator, dtype=torch.float64) @ torch.randn(WIDTH, WIDTH, generator=generator).double()
    gain = 0.5 + torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    axes = random_rotation(WIDTH, generator)
    assert relative(undo_by_regression(y.T @ y, gain, axes), torch.diag(1 / gain)) < 1e-8
    gain[5] = 0
    seen = gain * y @ axes[:, :20]
    expected = seen @ torch.linalg.lstsq(seen, y).solution
    undo = undo_by_regression(y.T @ y, gain, axes[:, :20])
    assert relative(seen @ axes[:, :20].T @ undo, expected) < 1e-8


def test_fitted_errors_are_smaller():
    model, ids = gemma(), token_ids(20)
    metric, fitted = (
        slice_model(model, ids, 0.25, layout="low-rank", output_norms=way).edits[0]["norm_errors"] for way in ("metric", "fitted")
    )
    assert all(a < b for a, b in zip(fitted[:-1], metric[:-1], strict=True))  # the last deletes nothing


def test_fit_is_better_than_no_fit():
    model, ids = gemma(), token_ids()
    fitted = slice_model(model, ids, 0.5, output_norms="metric", slice_head=True)
    found = list(
        junctions(ResidualStream(model, ids), decompose(ResidualStream(model, ids)), [16] * 7, Settings(output_norms="metric"))
    )
    assert [j.fit.error for j in found[1:]] == fitted.edits[0]["norm_errors"]
    assert found[0].fit is None
    unfitted = rotate_and_slice(model, (Junction(j.axes) for j in found), [16] * 7, "low-rank", output_norms="metric")
    exact = slice_model(model, ids, 0.5, output_norms="exact", slice_head=True)
    errors = [(logits(m, ids) - logits(exact, ids)).norm() for m in (fitted, unfitted)]
    assert errors[0] < errors[1]


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_the_default_refuses_and_names_both_ways_out():
    model = gemma()
    for refused in (
        lambda: slice_model(model, token_ids(), 0.25),
        lambda: slice_globally(model, torch.eye(WIDTH, dtype=torch.float64), 24),
        lambda: rotate_and_slice(model, rotations(), full(model), "low-rank"),
        lambda: shapes_only(model, full(model), "low-rank"),
    ):
        with pytest.raises(ValueError, match=r"sandwich norms.*output_norms=exact.*output_norms=metric or fitted"):
            refused()
    with pytest.raises(ValueError, match="refuse, exact, metric, fitted"):
        Settings(output_norms="fold")
    with pytest.raises(ValueError, match="statistics=sliced"):
        Settings(output_norms="metric", statistics="dense")


@pytest.mark.parametrize("gain", [0.0, 1e-6, -1e-6])
def test_a_gain_near_zero_needs_the_exact_form(gain):
    model = gemma()
    model.model.layers[1].post_feedforward_layernorm.weight.data[3] = gain - 1
    with pytest.raises(ValueError, match=r"1 entries of the gain of model\.layers\.1\.post_feedforward_layernorm.*=exact"):
        sweep(model, token_ids(), [0.25], Settings(output_norms="metric"))
    for way in ("exact", "fitted"):
        assert relative(logits(slice_model(model, token_ids(), 0.0, layout="low-rank", output_norms=way)), logits(model)) < EXACT
    fitted = slice_model(model, token_ids(), 0.25, layout="low-rank", output_norms="fitted")
    assert max(fitted.edits[0]["norm_errors"]) < 0.5


@pytest.mark.parametrize("output_norms", OUTPUT_NORMS)
def test_without_sandwich_norms_it_changes_nothing(output_norms):
    model = tiny("llama")
    sliced = slice_model(model, token_ids(), 0.25, output_norms=output_norms)
    assert torch.equal(logits(sliced), logits(slice_model(model, token_ids(), 0.25)))
    assert "output_norms" not in sliced.edits[0]


# --- used like any other ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_norms", EXTENSIONS)
def test_save_and_load(tmp_path, output_norms, layout, slice_head):
    if layout == "tied" and slice_head:
        pytest.skip("a tied head stays whole")
    sliced = slice_model(gemma(), token_ids(), 0.25, layout=layout, slice_head=slice_head, output_norms=output_norms)
    tokenizer = load("wiki-a-llama")[1]
    again = load(str(save(sliced, tokenizer, tmp_path / "small")), dtype="float64")[0]
    assert torch.equal(logits(again), logits(sliced))
    assert again.edits == sliced.edits
    assert sum(p.numel() for p in again.parameters()) == count(sliced).params


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_by_hand(layout):
    model = gemma()
    d, k, inner = WIDTH, 24, 48  # of attention and MLP alike
    sizes = {way: count(slice_model(model, token_ids(), 0.25, layout=layout, output_norms=way)) for way in EXTENSIONS}
    for way, size in sizes.items():
        found = slice_model(model, token_ids(), 0.25, layout=layout, output_norms=way)
        unique = {id(p): p for p in found.parameters()}.values()
        assert size.params == sum(p.numel() for p in unique)
        shapes = count(shapes_only(model, constant_widths(model, 0.25), layout, way))
        assert (shapes.params, shapes.decoder, shapes.macs_per_token) == (size.params, size.decoder, size.macs_per_token)
    steps = 2 * LAYERS
    exact = steps * (d * inner) + (steps - 1) * d * k + d * d  # writers whole, then diag(g) B
    metric = (steps - 1) * (k * inner + k * k + 1) + d * inner + d * d + 1  # writers cut, but for the last; root and floor
    assert sizes["exact"].decoder - sizes["metric"].decoder == exact - metric
    assert sizes["metric"].decoder - sizes["fitted"].decoder == 1  # the last norm, where nothing is deleted, has no floor


@pytest.mark.parametrize("layout", ["low-rank", "tied"])
@pytest.mark.parametrize("output_norms", EXTENSIONS)
def test_generation_with_a_cache_is_the_forward_pass(output_norms, layout):
    sliced = slice_model(gemma(), token_ids(), 0.25, layout=layout, output_norms=output_norms)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    out = sliced.generate(token_ids(2), use_cache=True, return_dict_in_generate=True, output_logits=True, **settings)
    forced = logits(sliced, out.sequences)[:, 19:-1]
    assert relative(torch.stack(out.logits, dim=1).to(forced), forced) < 1e-5  # generate keeps its logits in float32
    assert torch.equal(forced.argmax(-1), out.sequences[:, 20:])


@pytest.mark.parametrize("output_norms", EXTENSIONS)
def test_in_place_and_lower_precision(output_norms):
    settings = dict(layout="low-rank", output_norms=output_norms)
    expected = logits(slice_model(gemma(), token_ids(), 0.25, **settings))
    assert torch.equal(logits(slice_model(gemma(), token_ids(), 0.25, inplace=True, **settings)), expected)
    single = slice_model(gemma().float(), token_ids(), 0.25, **settings)
    assert relative(logits(single).double(), expected) < 1e-3
    half = slice_model(gemma().bfloat16(), token_ids(), 0.25, **settings)
    assert relative(logits(half).double(), expected) < 0.3


def test_query_and_key_norms_are_left_alone():
    model = gemma()
    sliced = slice_model(model, token_ids(), 0.25, layout="low-rank", output_norms="metric")
    for before, after in zip(model.model.layers, sliced.model.layers, strict=True):
        for name in ("q_norm", "k_norm"):
            old, new = (getattr(layer.self_attn, name) for layer in (before, after))
            assert type(new) is type(old)
            assert new.weight is old.weight


@pytest.mark.parametrize(
    "settings", [["output_norms=metric"], ["output_norms=metric", "schedule=variance"], ["output_norms=exact"]]
)
def test_compress_command(tmp_path, settings):
    tokenizer = load("wiki-a-llama")[1]
    model = gemma(vocab_size=len(tokenizer)).float()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = dict(samples=4, length=32, set=settings)
    tasks.compress.body(None, str(tmp_path / "model"), str(tmp_path / "small"), "slicegpt", 0.25, **arguments)
    small = load(str(tmp_path / "small"))[0]
    assert small.config.tie_word_embeddings
    assert torch.isfinite(logits(small)).all()
    edit = json.loads((tmp_path / "small" / "compression.json").read_text())["edits"][0]
    assert len(edit["norm_errors"]) == 2 * LAYERS
    assert (max(edit["norm_errors"]) > 0) == ("metric" in settings[0])
