"""The examples of README.md and lib/README.md run as they are printed, and do what the pages say of them; papers are cited."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import tasks
from lib.equal_size import own_ratio
from lib.evaluation.perplexity import perplexity
from lib.evaluation.text import calibration_text, load_corpus, sample_blocks, tokens_of
from lib.methods import METHODS, make
from lib.models import checkpoint
from lib.models.load import load
from lib.papers.slicegpt import slice_model
from lib.primitives import anatomy
from lib.primitives.anatomy import FAMILIES
from lib.primitives.cost import count
from lib.primitives.moments import walk
from lib.primitives.structured import ffn_widths
from tests.conftest import relative

ROOT = Path(__file__).parent.parent
README, LIBRARY = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "lib/README.md"))
EXACT = 1e-10


def section(page: str, title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def code(page: str, title: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", section(page, title), re.M | re.S)


@contextlib.contextmanager
def tables_put_back():
    """The examples add to tables of the library; other tests should not see it."""
    tables = (METHODS, anatomy.FAMILIES)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def run(title: str, folder: Path) -> dict:
    """The names that all blocks of a section of lib/README.md, run one after the other in a folder, define."""
    names = {"__name__": "readme"}
    with contextlib.chdir(folder):
        for block in code(LIBRARY, title):
            exec(compile(block, f"lib/README.md, {title}", "exec"), names)
    return names


def test_compressing_in_python(tmp_path):
    """On the embedded model, with a few short samples; all else as it is printed."""
    (block,) = code(README, "Use it on your own model")
    (tmp_path / "my_corpus.txt").write_text("\n\n".join(load_corpus("wiki-a", "train").rows[:300]))
    for printed, quick in (("path/to/a/llama", "wiki-a-llama"), ("128, 2048", "4, 64")):
        assert printed in block
        block = block.replace(printed, quick)
    names = {}
    with contextlib.chdir(tmp_path):
        exec(compile(block, "README.md, Use it on your own model", "exec"), names)
    assert names["smaller"].get_input_embeddings().weight.shape[1] == 96  # of 128


@pytest.mark.parametrize(("title", "blocks"), [("Add a method", 2), ("Add a model family", 1)])
def test_examples_are_short(title, blocks):
    assert len(code(LIBRARY, title)) == blocks
    assert sum(len(block.splitlines()) for block in code(LIBRARY, title)) < 50


# --- a method -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    """The names that the section defines, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("method")
    with tables_put_back():
        yield run("Add a method", folder), folder


@pytest.fixture(scope="module")
def workshop():
    return load("wiki-a-llama", dtype="float64")


@pytest.fixture(scope="module")
def ids(workshop):
    return sample_blocks(calibration_text("wiki-a"), workshop[1], 4, 64, torch.Generator().manual_seed(5), "rows")


def down_projections(model):
    return [block.mlp.down_proj for block in model.model.layers]


@contextlib.contextmanager
def zeroed(weight: torch.Tensor, columns):
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[:, columns] = 0
        yield
        weight.copy_(saved)


def written(model, ids, block):
    """What the MLP of a block adds to the stream: [tokens, d]."""
    seen = []
    handle = down_projections(model)[block].register_forward_hook(lambda _, x, y: seen.append(y.flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def test_the_score_is_the_error_of_cutting_that_neuron_alone(method, workshop, ids):
    model = workshop[0]
    scores = method[0]["neuron_scores"](model, ids)
    assert [len(score) for score in scores] == ffn_widths(model)
    for block, neuron in ((0, 0), (0, 17), (2, 100), (len(scores) - 1, 3)):
        before = written(model, ids, block)
        with zeroed(down_projections(model)[block].weight, [neuron]):
            error = (written(model, ids, block) - before).square().sum(1).mean()
        assert scores[block][neuron].item() == pytest.approx(error.item(), rel=1e-9)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_lowest_scores_go_and_nothing_else_changes(method, workshop, ids, allocation):
    model = workshop[0]
    scores = method[0]["neuron_scores"](model, ids)
    small = make("neuron-energy", model, ids, 0.2, allocation=allocation)
    widths = [len(score) for score in scores]
    if allocation == "global":
        limit = torch.cat(scores).sort().values[sum(widths) - int(0.8 * sum(widths))]
        stay = [score >= limit for score in scores]
        assert len({int(kept.sum()) for kept in stay}) > 1
    else:
        stay = [score >= score.sort().values[len(score) - int(0.8 * len(score))] for score in scores]
    assert ffn_widths(small) == [int(kept.sum()) for kept in stay]
    with contextlib.ExitStack() as masked:
        for layer, kept in zip(down_projections(model), stay, strict=True):
            masked.enter_context(zeroed(layer.weight, ~kept))
        assert relative(small(ids).logits, model(ids).logits) < EXACT


def test_the_saved_model_is_the_one_that_was_made(method):
    names, folder = method
    edits = json.loads((folder / "small" / "compression.json").read_text())["edits"]
    assert edits == [{"edit": "structured", "neurons": ffn_widths(names["model"])}]
    model, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(calibration_text("wiki-a"), tokenizer, 32, 256, torch.Generator().manual_seed(0), "rows")
    made = make("neuron-energy", model, ids, 0.2, allocation="global")
    with torch.no_grad():
        assert torch.equal(made(ids[:2]).logits, names["model"](ids[:2]).logits)


def test_the_perplexities_of_the_page(method):
    text = " ".join(section(LIBRARY, "Add a method").split())
    printed = re.search(r"perplexity ([\d.]+) \(dense ([\d.]+), CFSP ([\d.]+), random neurons ([\d.]+)\)", text).groups()
    model, tokenizer = load("wiki-a-llama")
    ids = sample_blocks(calibration_text("wiki-a"), tokenizer, 32, 256, torch.Generator().manual_seed(0), "rows")
    stream = tokens_of(load_corpus("wiki-a", "test"), tokenizer)
    rivals = [make(name, model, ids, 0.2) for name in ("cfsp", "random-neurons")]
    found = [perplexity(network, stream, 256, 60).perplexity for network in (method[0]["model"], model, *rivals)]
    assert found == pytest.approx([float(number) for number in printed], abs=0.02)


def test_the_command_knows_the_method_and_makes_a_stock_model(method, tmp_path, capsys):
    tasks.compress.body(None, model="wiki-a-llama", out=str(tmp_path / "stock"), method="neuron-energy", samples=2, length=64)
    assert "wiki-a-llama, neuron-energy at 25%" in capsys.readouterr().out
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    dense = load("wiki-a-llama")[0].config.intermediate_size
    assert set(ffn_widths(stock)) == {stock.config.intermediate_size} == {int(0.75 * dense)}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_its_ratio_for_an_equal_size_is_found(method, workshop, ids, allocation):
    model = workshop[0]
    share = own_ratio("neuron-energy", model, 0.2)
    small = make("neuron-energy", model, ids, share, allocation=allocation)
    step = 3 * model.config.hidden_size * len(ffn_widths(model)) / count(model).decoder  # one neuron of every block
    assert count(small).against(count(model))["removed_decoder"] == pytest.approx(0.2, abs=step)


# --- a family -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    with tables_put_back():
        torch.manual_seed(0)
        yield run("Add a model family", tmp_path_factory.mktemp("family"))


def error_at_full_width(model, ids, layout="dense"):
    with torch.no_grad():
        return relative(slice_model(model, ids, 0.0, layout=layout)(ids).logits, model(ids).logits)


def test_the_family_is_new_and_exact(family):
    assert "starcoder2" in FAMILIES
    assert family["error"] < EXACT
    for layout in ("low-rank", "dense", "tied"):
        assert error_at_full_width(family["model"], family["ids"], layout) < EXACT


def sliced_by_hand(model, ids, k):
    """Logits of a StarCoder 2 whose stream is projected to its k principal axes at each junction, by hooks on its modules."""
    handles, entered = [], []

    def project(x):
        x = x - x.mean(-1, keepdim=True)
        axes = torch.linalg.eigh(torch.einsum("bti,btj->ij", x, x))[1][:, -k:]
        return x @ axes @ axes.T

    def enter(_, inputs):
        entered.append(project(inputs[0]))
        return (entered[-1], *inputs[1:])

    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(enter))
        handles.append(block.self_attn.register_forward_hook(lambda _, x, y: (project(entered[-1] + y[0]) - entered[-1], *y[1:])))
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def test_a_sliced_one_is_the_dense_one_on_a_projected_stream(family, tmp_path):
    model, ids = family["model"], family["ids"]
    for layout in ("low-rank", "dense", "tied"):
        small = slice_model(model, ids, 0.25, layout=layout)
        with torch.no_grad():
            assert relative(small(ids).logits, sliced_by_hand(model, ids, 24)) < 1e-8
            again = checkpoint.load_checkpoint(checkpoint.save(small, None, tmp_path / layout))
            assert torch.equal(again(ids).logits, small(ids).logits)
    assert relative(sliced_by_hand(model, ids, 24), model(ids).logits) > 1e-3


def test_walks_counts_and_cuts_of_the_new_family(family, tmp_path):
    model, ids, seen = family["model"], family["ids"], []
    handles = [b.mlp.c_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1))) for b in model.model.layers]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    for moments, x in zip(list(walk(model, ids, ["mlp.c_proj"])), seen, strict=True):
        torch.testing.assert_close(moments["mlp.c_proj"].square, x.square().mean(0), rtol=1e-10, atol=0)
    attention, mlp, norms = 32 * 33 * 2 + 16 * 33 * 2, 48 * 33 + 32 * 49, 2 * 2 * 32
    assert count(model).decoder == 3 * (attention + mlp + norms)
    assert count(model).params == count(model).decoder + 80 * 32 + 2 * 32  # the head is the table
    small = make("random-neurons", model, ids, 0.25)
    again = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.export(small, None, tmp_path / "stock"), dtype="float64")
    assert again.config.intermediate_size == 36
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, small(ids).logits)


def test_a_wrong_record_is_found(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, "starcoder2", replace(FAMILIES["starcoder2"], subtracts_mean=False))
    assert error_at_full_width(family["model"], family["ids"]) > 1e-3


def test_granite_passes_without_shortcuts_and_fails_with_them(family, monkeypatch):
    """Why the page checks with dense shortcuts: what a half adds is scaled, and with it the shortcut that its writer applies."""
    monkeypatch.setitem(FAMILIES, "granite", FAMILIES["llama"])
    special = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
    config = transformers.GraniteConfig(**family["tiny"], **special, vocab_size=80, residual_multiplier=0.5)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.3)
    assert error_at_full_width(model, family["ids"], "low-rank") < 1e-6  # RMSNorm computes in float32
    assert error_at_full_width(model, family["ids"], "dense") > 1e-3


# --- references -----------------------------------------------------------------------------------------------------------

CITED = section(LIBRARY, "Sources and what is ours")
ARXIV = r"\b\d{4}\.\d{5}\b"


def test_every_paper_that_the_code_names_is_cited():
    cited = set(re.findall(ARXIV, CITED))
    named = {
        number: path.name
        for path in [*(ROOT / "lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
        for number in re.findall(rf"arXiv:? ({ARXIV})", path.read_text(encoding="utf-8"))
    }
    assert len(named) >= 14
    assert not {number: file for number, file in named.items() if number not in cited}


def test_readme_cites_the_four_papers():
    papers = CITED[: CITED.index("The rivals in")]
    cited = set(re.findall(ARXIV, section(README, "Cite")))
    assert cited == set(re.findall(ARXIV, papers)) == set(re.findall(ARXIV, README[: README.index("## Two commands")]))
    assert len(cited) == 3
    for text in (papers, section(README, "Cite"), README[: README.index("## Two commands")]):
        assert "Kobayashi" in text  # the fourth, which is not on arXiv


def test_every_rival_has_its_source():
    ours = {"__init__.py", "moments.py", "random_neurons.py", "magnitude.py", "svd.py"}  # controls, and what rivals share
    files = {path.name for path in (ROOT / "lib" / "baselines").glob("*.py")} - ours
    listed = re.search(r"^The rivals in.*?\n\n", CITED, re.M | re.S)[0]
    assert set(re.findall(r"`(\w+\.py)`", listed)) == files
    for name in files:
        numbers = re.findall(ARXIV, (ROOT / "lib" / "baselines" / name).read_text(encoding="utf-8").split('"""')[1])
        for number in numbers:
            assert re.search(rf"`{name}` \([^`]*{number}", listed), name


def test_what_is_ours_is_where_it_says():
    rows = [line for line in CITED.splitlines() if line.startswith("|") and re.search(r"`(lib|notebooks)/", line)]
    assert len(rows) == 11
    for row in rows:
        for part in row.split("|")[2].split(";"):
            names = re.findall(r"`([^`]+)`", part)
            files = [name for name in names if "/" in name]
            texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
            assert texts
            for name in names[len(files) :]:
                assert re.search(rf"\b(def {name}\(|class {name}\b)|^{name} = ", texts[0], re.M), name
