"""The block-by-block walk is the model: any family, any attention."""

import gc
import math

import pytest
import torch

from lib.primitives.anatomy import Anatomy, attention_half, family_of
from lib.primitives.calibration import ResidualStream, check_calibration, enter, inputs_on_the_way, run_seeing
from tests.conftest import CONFIGS, LAYERS, WIDTH, relative, tiny, token_ids


def logits_by_walking(model, stream):
    anatomy = Anatomy(model)
    for block in range(LAYERS):
        stream.advance_block(block)
    return anatomy.head(anatomy.get(anatomy.family.final_norm)(stream.hidden))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_walk_equals_model(family, attention):
    model = tiny(family, torch.float32, attention)
    ids = token_ids(5)
    with torch.no_grad():
        walked = logits_by_walking(model, ResidualStream(model, ids, batch=2))  # last batch has one row
        assert relative(walked, model(ids).logits) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_walk_is_causal(family):
    model, ids = tiny(family, torch.float32, "eager"), token_ids(2)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 79 + 1
    streams = [ResidualStream(model, i) for i in (ids, changed)]
    for stream in streams:
        stream.advance_block(0)
    assert torch.equal(streams[0].hidden[:, :-1], streams[1].hidden[:, :-1])
    assert not torch.equal(streams[0].hidden[:, -1], streams[1].hidden[:, -1])


@pytest.mark.parametrize("family", CONFIGS)
def test_steps_from_junction_to_junction_make_a_block(family):
    model = tiny(family)
    streams = [ResidualStream(model, token_ids(3), batch=2) for _ in range(2)]
    for run, halves in streams[0].anatomy.steps:
        assert halves
        streams[0].advance(run, 1)
    streams[1].advance_block(1)
    assert relative(streams[0].hidden, streams[1].hidden) < 1e-12
    assert streams[0].anatomy.junctions == (LAYERS if streams[0].anatomy.family.parallel else 2 * LAYERS) + 1


@pytest.mark.parametrize("family", CONFIGS)
def test_observed_inputs_are_those_of_the_running_model(family):
    model, ids = tiny(family, torch.float32), token_ids(5)
    stream = ResidualStream(model, ids, batch=2)
    stream.advance_block(0)
    before, names = stream.hidden.clone(), [name for half in stream.anatomy.halves for name in (half.readers[0], half.writer)]
    seen = {name: [] for name in names}
    stream.observe(1, {name: found.append for name, found in seen.items()})
    assert torch.equal(stream.hidden, before)
    expected, block = {}, stream.anatomy.blocks[1]
    for name in names:
        block.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: expected.update({name: x[0]}))
    with torch.no_grad():
        model(ids)
    for name, found in seen.items():
        assert relative(torch.cat(found), expected[name].flatten(0, -2)) < 1e-5


def test_observing_can_advance():
    model, ids = tiny("opt"), token_ids(5)
    one, two = (ResidualStream(model, ids, batch=2) for _ in range(2))
    seen = []
    one.observe(0, {"fc2": seen.append}, advance=True)
    two.advance_block(0)
    assert torch.equal(one.hidden, two.hidden)
    assert len(torch.cat(seen)) == ids.numel()


def test_what_a_block_moves_is_shown_before_and_behind_it():
    model, ids = tiny("opt"), token_ids(5)
    stream, seen = ResidualStream(model, ids, batch=2), []
    before = stream.hidden.clone()
    stream.observe(0, {}, advance=True, moved=lambda x, y: seen.append((x.clone(), y.clone())))
    assert torch.equal(torch.cat([x for x, _ in seen]), before)
    assert torch.equal(torch.cat([y for _, y in seen]), stream.hidden)
    assert not torch.equal(before, stream.hidden)


def test_observing_ends_at_the_last_module_that_is_looked_at():
    model, ids = tiny("llama"), token_ids(5)
    stream, ran, seen = ResidualStream(model, ids, batch=2), [], {"mlp.down_proj": [], "self_attn.q_proj": []}
    stream.anatomy.blocks[0].mlp.down_proj.register_forward_hook(lambda *_: ran.append(True))
    stream.observe(0, {name: found.append for name, found in seen.items()})
    assert not ran
    assert [len(torch.cat(found)) for found in seen.values()] == 2 * [ids.numel()]
    stream.observe(0, {"mlp.down_proj": lambda x: None}, advance=True)
    assert len(ran) == 3


def test_results_are_seen_with_the_inputs():
    """Outputs beside the inputs they come from, whatever else is watched; the pass ends behind the last."""
    model, ids = tiny("opt"), token_ids(5)
    stream, inputs, pairs = ResidualStream(model, ids, batch=2), [], []
    block = stream.anatomy.blocks[1]
    before = stream.hidden.clone()
    stream.observe(1, {"fc2": inputs.append}, results={"fc2": lambda x, y: pairs.append((x, y))})
    assert torch.equal(stream.hidden, before)
    assert len(inputs) == len(pairs) == 3
    for seen, (x, y) in zip(inputs, pairs, strict=True):
        assert torch.equal(seen, x)
        assert relative(y, block.fc2(x)) < 1e-12
    assert sum(len(x) for x in inputs) == ids.numel()
    ran = []
    block.fc1.register_forward_hook(lambda *_: ran.append(True))
    stream.observe(1, {}, results={"self_attn.out_proj": lambda x, y: None})
    assert not ran
    stream.observe(1, {}, True, results={"self_attn.out_proj": lambda x, y: None})
    assert len(ran) == 3
    assert not torch.equal(stream.hidden, before)


def test_model_is_left_as_it_was():
    model, ids = tiny("llama"), token_ids(2)
    before = [type(m) for m in model.modules()]
    stream = ResidualStream(model, ids)
    stream.advance_block(0)
    assert [type(m) for m in model.modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_entry_restores_blocks_when_the_model_fails():
    model = tiny("llama")
    with pytest.raises(IndexError):
        enter(Anatomy(model), torch.tensor([[10_000]]))
    assert type(Anatomy(model).blocks[0]).__name__ == "LlamaDecoderLayer"


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt_neox", {"use_parallel_residual": False}, "parallel blocks"),
        ("phi", {"qk_layernorm": True}, "normalises queries"),
        ("opt", {"do_layer_norm_before": False}, "pre-norm"),
    ],
)
def test_variants_that_the_record_does_not_describe_are_refused(family, settings, message):
    with pytest.raises(ValueError, match=message):
        Anatomy(tiny(family, **settings))


def test_wrong_family_record_is_reported():
    model = tiny("llama")
    family = family_of(model.config)
    broken = type(family)(**{**family.__dict__, "mlp": type(family.mlp)("self_attn.q_proj_unused", (), "mlp.down_proj")})
    model.model.layers[0].self_attn.q_proj_unused = torch.nn.Identity()
    x, kwargs = enter(Anatomy(model), token_ids(1))
    with pytest.raises(RuntimeError, match="never called"):
        attention_half(model.model.layers[0], broken, x, kwargs[0])


def test_gram_equals_float64_product_and_does_not_depend_on_batches():
    model, ids = tiny("llama"), token_ids(7)
    stream = ResidualStream(model, ids, batch=3)
    x = stream.hidden.flatten(0, 1)
    assert relative(stream.gram(), x.T @ x) < 1e-14
    assert relative(ResidualStream(model, ids, batch=7).gram(), stream.gram()) < 1e-14


def test_gram_centres_only_for_layer_norm_families():
    for family, centred in (("opt", True), ("llama", False)):
        gram = ResidualStream(tiny(family), token_ids()).gram()
        along_ones = (gram @ torch.ones(WIDTH, dtype=torch.float64)).norm() / gram.norm()
        assert (along_ones < 1e-12) == centred


@pytest.mark.parametrize("family", CONFIGS)
def test_the_inputs_of_a_block_are_what_the_running_model_calls_it_with(family):
    model, ids = tiny(family), token_ids(5)
    stream, called = ResidualStream(model, ids, batch=2), []
    stream.advance_block(0)
    block = stream.anatomy.blocks[1]
    with block.register_forward_pre_hook(lambda _, inputs, kwargs: called.append((inputs[0], kwargs)), with_kwargs=True):
        with torch.no_grad():
            model(ids)
        batches = list(stream.inputs(1))
        outputs = torch.cat([block(batch.hidden, **batch.kwargs) for batch in batches])
    assert [batch.rows for batch in batches] == list(stream.rows()) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    (whole, kwargs), *_ = called
    assert relative(torch.cat([batch.hidden for batch in batches]), whole) < 1e-12
    assert relative(outputs, block(whole, **kwargs)) < 1e-12
    stream.advance_block(1)
    assert relative(stream.hidden, outputs) < 1e-12


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_step_run_seeing_shows_what_a_module_read_and_put_out(family):
    stream = ResidualStream(tiny(family), token_ids(3), batch=2)
    anatomy, block = stream.anatomy, stream.anatomy.blocks[0]
    for run, (half,) in anatomy.steps:
        watched, pairs = [], []
        for batch in stream.inputs(0):
            out, x, y = run_seeing(run, block, anatomy.family, batch, half.writer)
            pairs.append((x, y))
            watched.append(out)
            assert x.shape[:2] == y.shape[:2] == batch.hidden.shape[:2]
            assert torch.equal(inputs_on_the_way(run, block, anatomy.family, batch, half.writer), x)
            assert relative(block.get_submodule(half.writer)(x), y) < 1e-12
            assert relative(batch.hidden + y, out) < 1e-12
        stream.advance(run, 0)
        assert relative(torch.cat(watched), stream.hidden) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, i: (m, i[:, :0]), "not empty"),
        (lambda m, i: (m, i[0]), r"\[samples, tokens\]"),
        (lambda m, i: (m, i.repeat(1, 4)), "64 positions"),
        (lambda m, i: (m, i + 80), "vocabulary"),
        (lambda m, i: (m, i - 80), "vocabulary"),
        (lambda m, i: (m.train(), i), "eval"),
    ],
)
def test_bad_calibration_is_refused(change, message):
    model, ids = change(tiny("llama"), token_ids())
    with pytest.raises(ValueError, match=message):
        ResidualStream(model, ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [(0, 0), (17, 5), (-1, -1)])
def test_one_bad_weight_is_found_and_large_ones_pass(dtype, place):
    model = tiny("llama", dtype)
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    weight.fill_(torch.finfo(dtype).max)  # a sum of these would overflow
    check_calibration(Anatomy(model), token_ids())
    for bad in (math.nan, math.inf, -math.inf):
        weight.fill_(1)
        weight[place] = bad
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
            check_calibration(Anatomy(model), token_ids())


def test_nan_weights_are_refused_by_name():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight"):
        ResidualStream(model, token_ids())


def test_unknown_and_post_norm_models_are_refused():
    import transformers

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match="gpt2.*fused.*Supported are.*llama"):
        family_of(gpt2.config)
    for settings in ({"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}):
        with pytest.raises(ValueError, match="OPT-350M"):
            family_of(tiny("opt", **settings).config)


def test_nothing_of_a_stream_waits_for_the_garbage_collector():
    """What a cycle holds would stay in memory beside the next stream."""
    model, ids = tiny("llama"), token_ids()
    ResidualStream(model, ids).advance_block(0)  # what the libraries set up once
    gc.collect()
    gc.disable()
    try:
        stream = ResidualStream(model, ids)
        stream.advance_block(0)
        del stream
        assert gc.collect() == 0
    finally:
        gc.enable()
