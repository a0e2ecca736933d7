"""A budget is kept on the counts of the file that is written, by the lowest ratio that does."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from invoke import Exit

import tasks
from lib.budgets import ATTEMPTS, Budget, cache_bytes, fitting_ratio, made_within, quantity
from lib.compress import compress
from lib.equal_size import STEPS
from lib.evaluation.text import Calibration
from lib.methods import METHODS, make, settings_of
from lib.models.checkpoint import export, read_record, save
from lib.models.gguf_export import DTYPES, FileSize, to_gguf
from lib.models.load import ASSETS, load
from lib.primitives.cost import count
from lib.primitives.structured import remove_blocks, remove_groups
from tests.conftest import CONFIGS, tiny, token_ids
from tests.test_gguf import LLAMA3, ROWS


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("80MB", 80e6),
        ("100M", 100e6),
        ("1.5 g", 1.5e9),
        ("512MiB", 512 * 2**20),
        ("0.3", 0.3),
        ("30%", 0.3),
        ("7", 7),
        (".5k", 500),
    ],
)
def test_quantities(text, number):
    assert quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_cache_has_the_bytes_that_were_counted(family):
    model, ids = tiny(family, torch.float32), token_ids(2, 7)
    cache = model(ids, use_cache=True).past_key_values
    held = sum(kept.nbytes for layer in cache.layers for kept in (layer.keys, layer.values))
    assert held == 2 * 7 * cache_bytes(model)


def test_fewer_heads_and_blocks_keep_less():
    model = tiny("llama", torch.float32, num_hidden_layers=4, num_key_value_heads=2)
    fewer = remove_blocks(remove_groups(model, [torch.tensor([0])] * 4), [1])
    assert cache_bytes(fewer) == cache_bytes(model) * 3 // 8


def test_why_a_method_cannot_work_at_all_is_said():
    model, budget, method = load("wiki-a-opt")[0], Budget("share", 0.9), METHODS["slicegpt-stock"]
    with pytest.raises(ValueError, match="is not a stock model"):
        fitting_ratio(method.name, model, budget, budget.size_of(model, "", ""), method.settings())


@pytest.mark.parametrize("text", ["", "many", "-3M", "80 TB", "1e6", "0.3.1", "%"])
def test_what_is_no_quantity(text):
    with pytest.raises(ValueError, match="write it like 80MB"):
        quantity(text)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.shape])
def test_the_lowest_ratio_that_keeps_to_it(name):
    """One step less would be too large; the compressed model has the size that was counted, where data do not decide on it."""
    model, settings = tiny("llama", intermediate_size=96, num_hidden_layers=4), settings_of(name, {})
    budget = Budget("share", 0.85)
    size = budget.size_of(model, "", "")
    ratio = fitting_ratio(name, model, budget, size, settings)
    step = (
        1 / model.config.hidden_size if ratio * model.config.hidden_size == round(ratio * model.config.hidden_size) else 1 / STEPS
    )
    shape = METHODS[name].shape
    assert size(shape(model, ratio, settings)) <= 0.85 < size(shape(model, ratio - step, settings))
    assert size(make(name, model, token_ids(), ratio)) == pytest.approx(size(shape(model, ratio, settings)), abs=0.03)


def test_budgets_that_cannot_be_kept():
    model = tiny("llama")
    whole = count(model).params
    for name, most, said in (
        ("wanda", 0.5, "wanda only sets weights to zero, .* as large as the dense model at any ratio"),
        ("sparsegpt", 0.5, "its zeros are stored like other numbers"),
        ("fpt", 0.5, r"fpt leaves at least \d\d\.\d% of the parameters of this model, and the budget is 50.0%"),
        ("cfsp", 1.0, r"the dense model has 100.0% .* is within the budget"),
        ("cfsp", 0.1, r"cfsp leaves at least \d\d\.\d% of the parameters of this model, and the budget is 10.0%"),
    ):
        budget = Budget("share", most)
        with pytest.raises(ValueError, match=said):
            fitting_ratio(name, model, budget, budget.size_of(model, "", ""), settings_of(name, {}))
    budget = Budget("params", whole - 1)
    assert fitting_ratio("cfsp", model, budget, budget.size_of(model, "", ""), settings_of("cfsp", {})) > 0


def test_a_method_without_a_shape_takes_a_ratio_alone(monkeypatch):
    model, budget = tiny("llama"), Budget("share", 0.8)
    monkeypatch.setitem(METHODS, "cfsp", replace(METHODS["cfsp"], shape=None))
    with pytest.raises(ValueError, match="known only afterwards: `invoke compress` takes it with a ratio alone"):
        fitting_ratio("cfsp", model, budget, budget.size_of(model, "", ""), settings_of("cfsp", {}))


# --- what is made larger than was counted --------------------------------------------------------------------------------


def attempts(over, budget=Budget("share", 0.8), name="cfsp"):
    """At which ratios a method was asked for a model, and the last one's size; all have `over` more than their shapes."""
    model, settings, asked = tiny("llama", intermediate_size=96, num_hidden_layers=4), settings_of(name, {}), []
    plain = budget.size_of(model, "", "")

    def make_at(ratio):
        asked.append(ratio)
        return METHODS[name].shape(model, ratio, settings)

    def size(small):
        return plain(small) + over * (small is not model)

    ratio = fitting_ratio(name, model, budget, plain, settings)
    found, small = made_within(name, model, budget, size, settings, ratio, make_at)
    assert asked[0] == ratio
    assert asked[-1] == found
    return asked, size(small)


def test_what_keeps_to_the_budget_is_made_once():
    asked, size = attempts(over=0.0)
    assert len(asked) == 1
    assert size <= 0.8


def test_what_is_larger_is_made_again_at_a_slightly_higher_ratio():
    asked, size = attempts(over=0.01)
    assert 1 < len(asked) <= ATTEMPTS
    assert asked == sorted(set(asked))
    assert 0.77 < size <= 0.8
    steps = [after - before for before, after in itertools.pairwise(asked)]
    assert steps == sorted(steps)  # none is smaller than the one before


def test_attempts_end():
    asked, size = attempts(over=1.0)
    assert len(asked) <= ATTEMPTS
    assert size > 0.8
    assert len(attempts(over=0.3, budget=Budget("share", 0.53))[0]) == 1  # no higher ratio leaves some of every layer


def test_compress_makes_a_model_that_keeps_to_its_budget(tmp_path):
    """Rows are filled up to multiples of 32, by more numbers where blocks differ: at the counted ratio 1 % too much."""
    budget, few = Budget("bytes", 1.3e6, "Q4_0"), Calibration("wiki-a", 4, 128)
    network, _ = load("wiki-a-llama")
    counted = fitting_ratio("cfsp", network, budget, FileSize(ASSETS / "wiki-a-llama", "m", "Q4_0"), settings_of("cfsp", {}))
    row = compress("wiki-a-llama", tmp_path / "m", "cfsp", budget, few)
    path = to_gguf(tmp_path / "m", tmp_path / "m.gguf", "Q4_0")
    assert row["budget"] == path.stat().st_size
    assert 1.26e6 < row["budget"] <= 1.3e6
    assert counted < row["ratio"] < counted + 0.1
    assert read_record(tmp_path / "m")["provenance"]["ratio"] == row["ratio"]
    once = compress("wiki-a-llama", tmp_path / "once", "cfsp", counted, few)
    assert "budget" not in once
    assert FileSize(ASSETS / "wiki-a-llama", "m", "Q4_0")(load(str(tmp_path / "once"))[0]) > 1.3e6
    again = compress("wiki-a-llama", tmp_path / "m2", "cfsp", counted, few, within=budget)
    assert (again["ratio"], again["budget"]) == pytest.approx((row["ratio"], row["budget"]), rel=1e-4)


# --- the bytes of a file -------------------------------------------------------------------------------------------------

MADE = {
    "dense": lambda: tiny("llama", torch.float32, vocab_size=ROWS),
    "stretched": lambda: tiny("llama", torch.float32, vocab_size=ROWS, rope_parameters=LLAMA3),
    "qwen2": lambda: tiny("qwen2", torch.float32, vocab_size=ROWS, head_dim=8),
    "unequal blocks": lambda: make("cfsp", tiny("llama", torch.float32, vocab_size=ROWS), token_ids(), 0.3),
    "fewer blocks": lambda: make("shortgpt", tiny("mistral", torch.float32, vocab_size=ROWS), token_ids(), 0.3),
    "biases": lambda: make("flap", tiny("llama", torch.float32, vocab_size=ROWS), token_ids(), 0.3),
}


@pytest.mark.filterwarnings("ignore:.*no multiple of 32")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MADE)
def test_a_file_has_the_bytes_that_were_counted(tmp_path, case, dtype):
    model, tokenizer = MADE[case](), load("wiki-a-llama")[1]
    folder = (save if getattr(model, "edits", None) else export)(model, tokenizer, tmp_path / "m")
    path = to_gguf(folder, tmp_path / "m.gguf", dtype)
    assert FileSize(folder, "m", dtype)(model.to("meta")) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "settings", "way"),
    [
        ("svd", {}, "its matrices are low-rank, in two factors. Multiply them with invoke merge-to-dense$"),
        ("slicegpt", {}, "slicegpt added shortcuts to it. Compress with method slicegpt-stock, which needs none$"),
        ("modegpt", {"attention": "all"}, "modegpt left its attention heads narrower .*--set attention=none`, which .* whole$"),
    ],
)
def test_what_no_file_holds_is_refused_as_the_export_does(tmp_path, name, settings, way):
    model, tokenizer = tiny("llama", torch.float32, vocab_size=ROWS, num_hidden_layers=4), load("wiki-a-llama")[1]
    small = make(name, model, token_ids(), 0.3, **settings)
    size, budget = FileSize(export(model, tokenizer, tmp_path / "dense"), "m", "Q4_0"), Budget("bytes", 1000, "Q4_0")
    with pytest.raises(ValueError, match=way) as counted:
        size(small)
    with pytest.raises(ValueError, match=way) as exported:
        to_gguf(save(small, tokenizer, tmp_path / "m"), tmp_path / "m.gguf")
    assert str(counted.value) == str(exported.value)
    with pytest.raises(ValueError, match=way):  # and not that the method leaves too much
        fitting_ratio(name, model, budget, size, settings_of(name, settings))


def test_from_the_command_line(tmp_path, capsys):
    """As many bytes as asked for, in a file of eight bits, for a model of the suite."""
    out, whole = tmp_path / "small", FileSize(ASSETS / "wiki-a-llama", "wiki-a-llama", "Q8_0")(load("wiki-a-llama")[0])
    asked = {"samples": 4, "length": 64, "method": "wanda-sp", "target_bytes": "1.9MB", "file": "Q8_0"}
    tasks.compress.body(None, "wiki-a-llama", str(out), **asked)
    said = re.search(r"it has (.*) MB in Q8_0, and may have 1.9 MB in Q8_0$", capsys.readouterr().out, re.MULTILINE)
    path = to_gguf(out, tmp_path / "small.gguf", "Q8_0")
    assert 1.85e6 < path.stat().st_size <= 1.9e6 < whole
    assert float(said[1]) == round(path.stat().st_size / 1e6, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_params": "1M", "target_share": "0.5"}, "give one of --target-params, --target-share"),
        ({"target_params": "1M", "file": "Q4_0"}, "--file says how --target-bytes is counted"),
        ({"target_bytes": "1MB", "file": "Q3"}, "unknown GGUF type 'Q3': choose one of float16"),
        ({"target_bytes": "small"}, "'small' is no size"),
        ({"target_params": "1T"}, "'1T' is no size"),
        (
            {"target_params": "1K", "method": "svd", "model": "wiki-a-opt"},
            "svd leaves at least .* parameters of this model",
        ),
        ({"target_bytes": "1.3MB", "file": "Q4_0", "method": "svd"}, "no GGUF architecture .* merge-to-dense"),
        ({"target_bytes": "1.3MB", "file": "Q4_0", "method": "slicegpt"}, "no GGUF architecture .* slicegpt-stock"),
        ({"target_bytes": "1MB", "file": "Q8_0", "model": "wiki-a-opt"}, "model type 'opt' has no GGUF export here"),
    ],
)
def test_bad_budgets_are_refused_before_the_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("lib.compress.make", None)
    with pytest.raises(Exit, match=message) as stop:
        tasks.compress.body(None, **({"model": "wiki-a-llama", "out": str(tmp_path / "o"), "method": "cfsp"} | arguments))
    assert stop.value.code == 2
    assert not (tmp_path / "o").exists()
