"""SliceGPT: exact where the paper says exact, equal to the literal algorithm, refused where it cannot work."""

import functools

import pytest
import torch
from torch import nn

from benchmarks.literal_slicegpt import LiteralSliceGPT
from lib.anatomy import FAMILIES, Anatomy
from lib.calibration import ResidualStream
from lib.cost import ARCHITECTURES, count
from lib.cost import meta_model as build_meta_model
from lib.linalg import random_rotation
from lib.slicegpt import (
    LAYOUTS,
    decompose,
    junctions,
    kept_width,
    rotate_and_slice,
    shapes_only,
    slice_embedding,
    slice_model,
    slice_reader,
    sweep,
)
from tests.conftest import CONFIGS, LAYERS, SLICEABLE, WIDTH, relative, tiny, token_ids

pytestmark = pytest.mark.usefixtures("exact_norms")
EXACT = 1e-10
meta_model = functools.cache(build_meta_model)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(seed=9) if ids is None else ids).logits


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
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
    assert relative(logits(slice_model(model, token_ids(), 0.0)), logits(model)) < EXACT


def test_layer_norm_without_offset():
    model = tiny("opt")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias = None
    assert relative(logits(slice_model(model, token_ids(), 0.0)), logits(model)) < EXACT


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
    rotated = rotate_and_slice(model, rotations, WIDTH, layout="dense")
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
    both = [slice_model(model, token_ids(), level, layout=layout, round_interval=1, slice_head=slice_head) for layout in LAYOUTS]
    assert relative(logits(both[0]), logits(both[1])) < EXACT
    assert relative(logits(both[0]), logits(model)) > 1e-3  # slicing does something
    k = kept_width(WIDTH, level, 1)
    shortcuts = [w.shortcut for block in Anatomy(both[0]).blocks for w in block.modules() if hasattr(w, "shortcut")]
    assert [None if c is None else tuple(c.shape) for c in shortcuts[:-1]] == [(k, min(k, WIDTH - k))] * (2 * LAYERS - 1)
    assert (shortcuts[-1] is None) != slice_head


def test_no_slicing_stores_no_shortcuts():
    sliced = slice_model(tiny("llama"), token_ids(), 0.0)
    assert not [name for name, _ in sliced.named_parameters() if "shortcut" in name]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_orientation_changes_weights_but_not_the_function(family, layout):
    model = tiny(family)
    settings = dict(layout=layout, round_interval=1)
    pca = slice_model(model, token_ids(), 0.3, **settings)
    turned = [
        slice_model(model, token_ids(), 0.3, orientation="random", generator=generator(seed), **settings) for seed in (0, 0, 1)
    ]
    for other in turned:
        assert relative(logits(other), logits(pca)) < EXACT
    tables = [Anatomy(m).get(Anatomy(m).family.embeddings[0]).weight for m in turned]
    assert torch.equal(tables[0], tables[1])
    assert not torch.allclose(tables[0], tables[2])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_float32_is_close(family):
    model = tiny(family, torch.float32)
    assert relative(logits(slice_model(model, token_ids(), 0.0)), logits(model)) < 1e-4


# --- the algorithm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("level", [0.1, 0.3, 0.5])
def test_equals_the_literal_two_evaluation_algorithm(level, tied):
    model = tiny("llama", tie_word_embeddings=tied)
    literal = LiteralSliceGPT(model, token_ids(), kept_width(WIDTH, level, 1), batch=4)
    for layout in LAYOUTS:
        ours = slice_model(model, token_ids(), level, layout=layout, round_interval=1)
        assert relative(logits(ours), literal(token_ids(seed=9))) < 1e-8


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_calibration_runs_the_finished_network(family):
    """The projected stream through the dense blocks is the sliced model's stream: same logits on the calibration set."""
    model, ids, k = tiny(family), token_ids(), 20
    stream = ResidualStream(model, ids, batch=4)
    for _ in junctions(stream, decompose(stream), k):
        pass
    anatomy = Anatomy(model)
    with torch.no_grad():
        expected = anatomy.head(anatomy.get(anatomy.family.final_norm)(stream.hidden))
    sliced = slice_model(model, ids, 1 - k / WIDTH, round_interval=1)
    assert relative(logits(sliced, ids), expected) < EXACT


def test_sweep_equals_single_runs_and_leaves_the_dense_model_alone():
    model = tiny("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    levels = (0.1, 0.3, 0.5)
    for level, sliced in sweep(model, token_ids(), levels, round_interval=1):
        assert torch.equal(logits(sliced), logits(slice_model(model, token_ids(), level, round_interval=1)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_in_place_equals_out_of_place(family):
    apart = slice_model(tiny(family), token_ids(), 0.25, round_interval=1)
    model = tiny(family)
    consumed = slice_model(model, token_ids(), 0.25, round_interval=1, inplace=True)
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
    one, two = (slice_model(tiny("llama"), token_ids(7), 0.25, batch=b) for b in (1, 7))
    assert relative(logits(one), logits(two)) < EXACT


def test_padding_has_no_effect():
    model, ids = tiny("llama"), token_ids(4)
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 20:] = 0
    assert relative(logits(slice_model(model, padded, 0.25, mask=mask)), logits(slice_model(model, ids, 0.25))) < EXACT


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_fewer_tokens_than_dimensions(family):
    """Three tokens, a covariance of rank three: on those very tokens nothing is lost, elsewhere the result is finite."""
    model, ids = tiny(family), token_ids(1, 3)
    sliced = slice_model(model, ids, 0.5, round_interval=1)
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
            for sliced in (slice_model(model, token_ids(), level, round_interval=1), rotate_and_slice(model, rotations, k)):
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
    assert torch.allclose(decompose(stream, "normalised")[0], values.clamp(min=0), atol=1e-3)


def test_gain_offset_of_gemma_style_norms():
    norm, layer = nn.Module(), nn.Linear(4, 3, bias=False, dtype=torch.float64)
    norm.weight = nn.Parameter(torch.tensor([0.5, -0.2, 0.0, 1.0], dtype=torch.float64))
    folded = slice_reader(layer, norm, torch.eye(4, dtype=torch.float64), FAMILIES["gemma3_text"])
    assert torch.allclose(folded.weight, layer.weight * torch.tensor([1.5, 0.8, 1.0, 2.0], dtype=torch.float64))


# --- a sliced model is used like any other ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", SLICEABLE)
def test_generation_with_and_without_cache(family, layout):
    sliced = slice_model(tiny(family), token_ids(), 0.25, layout=layout)
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    with_cache, without = (sliced.generate(token_ids(2), use_cache=c, **settings) for c in (True, False))
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 28)


def test_tying_cannot_come_back():
    sliced = slice_model(tiny("opt"), token_ids(), 0.25)
    expected = logits(sliced)
    sliced.tie_weights()
    assert torch.equal(logits(sliced), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_casts(dtype):
    sliced = slice_model(tiny("llama"), token_ids(), 0.25)
    expected = logits(sliced)
    assert relative(logits(sliced.to(dtype)).double(), expected) < 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_calibration_in_bfloat16(family, layout):
    exact = tiny(family)
    half = slice_model(tiny(family).bfloat16(), token_ids(), 0.25, layout=layout)
    assert half.dtype == torch.bfloat16
    assert relative(logits(half).double(), logits(slice_model(exact, token_ids(), 0.25))) < 0.15


def test_a_sliced_model_can_be_copied_after_use():
    import copy

    sliced = slice_model(tiny("opt"), token_ids(), 0.25, slice_head=True)
    expected = sliced(token_ids()).logits  # with gradients: a stored activation could not be copied
    assert torch.equal(copy.deepcopy(sliced)(token_ids()).logits, expected)


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_sandwich_norms_are_refused_because_rotation_breaks_them():
    model = tiny("gemma3_text")
    with pytest.raises(ValueError, match="sandwich"):
        slice_model(model, token_ids(), 0.25)
    # The reason, run: rotating such a model as if it were a Llama changes its function even without slicing.
    rotations = (random_rotation(WIDTH, generator(i)) for i in range(2 * LAYERS + 1))
    assert relative(logits(rotate_and_slice(model, rotations, WIDTH, layout="dense")), logits(model)) > 0.05


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


@pytest.mark.parametrize("level", [-0.1, 1.0, 1.5])
def test_levels_outside_the_range(level):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sweep(tiny("llama"), token_ids(), [0.25, level])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layout="sparse"), "low-rank, dense"),
        (dict(signal="cooked"), "raw, normalised"),
        (dict(orientation="north"), "pca, random"),
        (dict(orientation="random"), "Generator"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        sweep(tiny("llama"), token_ids(), [0.25], **settings)


def test_in_place_takes_one_level():
    with pytest.raises(ValueError, match="exactly one"):
        sweep(tiny("llama"), token_ids(), [0.1, 0.2], inplace=True)


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
    if c["model_type"] == "opt":
        f, p = c["ffn_dim"], c["max_position_embeddings"] + 2
        blocks = layers * (4 * d * k + 2 * f * k + 3 * d + f + 2 * k) + (d - k) * (f + 1)
        return (v + p) * k + blocks + shortcuts + v * d + v
    f = c["intermediate_size"]
    q = d
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    return v * k + layers * k * (2 * q + 2 * kv + 3 * f) + shortcuts + (d - k) * f + v * d


@pytest.mark.parametrize("level", [0.1, 0.2, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_match_the_closed_forms(name, level):
    dense = meta_model(name)
    k = kept_width(dense.config.hidden_size, level)
    published = count(shapes_only(dense, level, layout="dense")).params
    assert published == reference_count(name, k)
    d, layers = dense.config.hidden_size, dense.config.num_hidden_layers
    low_rank = count(shapes_only(dense, level)).params
    saved = (2 * layers - 1) * (k * k - k * min(k, d - k)) + k * d
    assert low_rank == published - saved


@pytest.mark.parametrize(
    ("name", "level", "layout", "params"),
    [
        ("OPT-125M", 0.2, "dense", 147_250_880),
        ("OPT-1.3B", 0.25, "dense", 1_207_988_832),
        ("OPT-6.7B", 0.3, "dense", 5_410_272_400),
        ("Llama-2-7B", 0.25, "dense", 5_704_777_728),
        ("Llama-2-7B", 0.3, "dense", 5_292_914_432),
    ],
)
def test_published_counts(name, level, layout, params):
    assert count(shapes_only(meta_model(name), level, layout=layout)).params == params


def test_counts_of_a_real_model_equal_those_of_its_shapes():
    model = tiny("opt")
    for layout in LAYOUTS:
        real = count(slice_model(model, token_ids(), 0.25, layout=layout))
        with torch.device("meta"):
            import transformers

            empty = transformers.AutoModelForCausalLM.from_config(CONFIGS["opt"]())
        assert count(shapes_only(empty, 0.25, layout=layout)).params == real.params
