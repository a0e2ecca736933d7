"""The pages of the project: generated tables are those of the results, and every path, link and command leads somewhere."""

import importlib.util
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
from invoke import Collection
from invoke.parser import Parser
from invoke.program import Program

import tasks
from lib.methods import METHODS, settings_of
from lib.papers.afr import PAPER
from lib.suite import pages
from tasks import NOTEBOOKS, RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "lib/README.md",
    "notebooks/README.md",
    "notebooks/params/README.md",
    "benchmarks/README.md",
    "results/README.md",
    "results/smollm2-135m/README.md",
    "results/gemma-3-270m/README.md",
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# --- generated tables -----------------------------------------------------------------------------------------------------


def rows_at_a_glance() -> list[str]:
    """The rows of results/README.md, from the committed tables: each paper's dense models and its methods at one ratio."""
    rows, shown = [], {"dense", "unstructured AFR", *PAPER, "CFSP", "FLAP, neurons", "LLM-Pruner"}
    for paper, ratios in (
        ("slicegpt", (0.25,)),
        ("svd_llm", (0.2,)),
        ("afr", (0.2,)),
        ("comp", (0.2,)),
    ):
        frame = pd.read_csv(RESULTS / "workshop" / paper / "tables" / "perplexity.csv")
        if paper == "afr":  # the whole field is in its notebook
            frame = frame[frame.method.isin(shown)]
        sparse = frame.method.str.contains("2:4")  # a share of zeros, whatever the ratio beside it
        for row in frame[frame.ratio.isin(ratios) | sparse | (frame.method == "dense")].itertuples():
            label = row.method if row.method == "dense" or "2:4" in row.method else f"{row.method}, {row.ratio:.0%}"
            times = f"{row.times_dense:.3f}" + (f" [{row.low:.3f}, {row.high:.3f}]" if row.method != "dense" else "")
            cells = [row.model, label, f"{row.perplexity:.2f}", times, f"{row.params:,}", f"{100 * row.removed_model:.1f} %"]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def equal_sizes_at_a_glance() -> list[str]:
    """The rows of the README's table: perplexity over dense of every method, at the real sizes that each model has."""

    def digits(value: float) -> str:
        if value < 1e5:
            return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")

    def shown(method: str, model: str, size: float) -> tuple[float, str]:
        mean = means[(means.method == method) & (means.model == model) & (means["size"] == size)]
        if len(mean):
            value, mark = mean.relative.iloc[0], "**" if mean.standing.iloc[0] in ("first", "level") else ""
            return value, f"{mark}{digits(value)}{mark}"
        row = frame[(frame.method == method) & (frame.model == model) & (frame["size"] == size)]
        if not len(row):
            return float("inf"), "n/a"
        value, removed = row.relative.iloc[0], row.removed_decoder.iloc[0]
        return value, digits(value) + (f" ({100 * removed:.0f} %)" if abs(removed - size) >= 0.015 else "")

    frame = at_equal_size()
    means = pd.concat([pd.read_csv(RESULTS / name / "compare/tables/standing.csv") for name in ("smollm2-135m", "workshop")])
    models = ("smollm2-135m", "wiki-a-llama", "wiki-a-opt", "gemma-3-270m")
    columns = [(m, size) for m in models for size in (0.2, 0.5) if len(frame[(frame.model == m) & (frame["size"] == size)])]
    methods = [method for method in frame.method.unique() if method != "dense"]
    ordered = sorted(sorted(methods), key=lambda method: shown(method, *columns[0])[0])
    return [f"| {method} | {' | '.join(shown(method, *column)[1] for column in columns)} |" for method in ordered]


def at_equal_size(table: str = "pareto") -> pd.DataFrame:
    profiles = ("smollm2-135m", "workshop", "gemma-3-270m")
    return pd.concat([pd.read_csv(RESULTS / profile / "compare" / "tables" / f"{table}.csv") for profile in profiles])


def tables_of(text: str) -> list[list[str]]:
    """The tables of a page, each as its lines."""
    parts = itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    return [list(lines) for table, lines in parts if table]


def test_readme_has_every_method_at_equal_size():
    """The whole table, and nothing below its last row."""
    glance = equal_sizes_at_a_glance()
    rows = "\n".join(["|---" * (glance[0].count(" | ") + 1) + "|", *glance, ""])
    assert f"{rows}\n" in read("README.md")


def test_the_tables_of_all_results_are_the_committed_tables():
    lines = read("results/README.md").splitlines()
    assert [line for line in lines if line.startswith("| wiki-a-")] == rows_at_a_glance()


def test_every_table_of_results_names_its_file_and_its_command():
    text = read("results/README.md").partition("## One table of each paper")[2]
    found = re.findall(r"\|\n\n.*?From \[`(.*?)`\]\((.*?)\), made by `(.*?)`\.\n", text)
    assert len(found) == len(tables_of(text)) == 4
    for paper, (name, link, command) in zip(("slicegpt", "svd_llm", "afr", "comp"), found, strict=True):
        assert name == link == f"workshop/{paper}/tables/perplexity.csv"
        assert command == f"invoke reproduce --paper {paper}"
    below = read("README.md").split("\n\nFrom `", 1)[1].split("<!--")[0]
    below = f"`{below}"
    assert re.findall(r"`results/(.*?)/compare/tables/pareto.csv`", below) == ["smollm2-135m", "workshop", "gemma-3-270m"]
    assert len(re.findall(r"`invoke reproduce .*?--paper compare.*?`", below)) == 3


def test_every_committed_run_is_listed():
    text, runs = read("results/README.md"), [path.parent for path in RESULTS.glob("*/*/manifest.json")]
    runs = [run.relative_to(RESULTS).as_posix() for run in runs if run.parent.name in pages.SHOWN]
    assert len(runs) == 8
    for run in runs:
        for place in (f"{run}/{run.split('/')[1]}.ipynb", f"{run}/tables", f"{run}/figures"):
            assert f"]({place})" in text
        assert f"[{len(list((RESULTS / run / 'tables').glob('*.csv')))} tables]({run}/tables)" in text


def test_committed_pages_are_those_that_reproduce_writes():
    found = pages.pages(ROOT)
    assert list(found) == ["README.md", "lib/README.md", "results/README.md", "results/claims.md"]
    for name, text in found.items():
        assert text == read(name), f"{name} is not what `invoke reproduce` would write"


@pytest.fixture
def drawn(monkeypatch):
    """What `write_pages` asks to be drawn; tests/test_plots.py draws it."""
    found = []
    monkeypatch.setattr(pages, "front_picture", lambda *given: found.append(given))
    return found


@pytest.fixture
def copy(tmp_path, drawn):
    """A project of nothing but what the pages are made of."""
    for name in [*pages.sources(), *(p.relative_to(ROOT) for p in RESULTS.glob("*/*/manifest.json"))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_pages_follow_the_tables(copy, drawn):
    assert pages.write_pages(copy) == "pages: results/README.md and results/claims.md written from the tables"
    assert drawn == [(copy / "results", list(pages.SHOWN))]
    assert pages.write_pages(copy) == "pages: up to date with the tables"
    assert (copy / "results/README.md").read_text() == read("results/README.md")
    table = copy / "results/workshop/compare/tables/standing.csv"
    frame = pd.read_csv(table)
    changed_row = (frame.model == "wiki-a-opt") & (frame.method == "SVD") & (frame["size"] == 0.5)
    frame.loc[changed_row, "relative"] = 1234.5
    frame.to_csv(table, index=False)
    assert pages.write_pages(copy) == "pages: README.md written from the tables"
    before, after = read("README.md").splitlines(), (copy / "README.md").read_text().splitlines()
    (changed,) = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed.startswith("| SVD | ")
    assert changed.split(" | ")[6] == "1,234"


def test_pages_stay_where_a_table_is_missing(copy):
    (copy / "results/gemma-3-270m/compare/tables/pareto.csv").unlink()
    said = pages.write_pages(copy)
    assert said == "pages: left as they are, because results/gemma-3-270m/compare/tables/pareto.csv is missing"
    assert not (copy / "results/README.md").exists()


@pytest.mark.parametrize("page", ["README.md", "lib/README.md"])
def test_a_page_without_its_place_is_an_error(copy, page):
    (copy / page).write_text(read(page).replace(pages.END, ""))
    with pytest.raises(ValueError, match=f"^{page} needs one place for its table"):
        pages.write_pages(copy)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ({}, 1),
        (dict(profile="gemma-3-270m"), 1),
        (dict(paper="slicegpt", set=["samples=2"]), 0),  # results/workshop-custom
        (dict(profile="opt-125m"), 0),  # its results are not committed
    ],
)
def test_reproduce_writes_the_pages_of_committed_profiles(arguments, written, monkeypatch, capsys):
    done = []
    monkeypatch.setattr("lib.suite.runs.reproduce_all", lambda runs, *_: done.append("run"))
    monkeypatch.setattr("lib.suite.profiles.check_machine", lambda *_: None)
    monkeypatch.setattr("lib.suite.pages.write_pages", lambda root: done.append(root) or "pages: as they were")
    tasks.reproduce.body(None, **arguments)
    assert done == ["run", *[tasks.ROOT] * written]
    assert capsys.readouterr().out.count("pages: as they were") == written


# --- the front page -------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 200 and not line.startswith("|")]


def test_readme_has_one_table_of_results():
    numbers = [table for table in tables_of(read("README.md")) if re.search(r"\| [\d,.e]+ \|", "\n".join(table))]
    assert [table[0].split("|")[1].strip() for table in numbers] == ["method"]
    assert len(numbers[0]) == 2 + len(equal_sizes_at_a_glance())


def test_readme_has_one_picture():
    (picture,) = re.findall(r"!\[[^\]]+\]\((.*?)\)", read("README.md"))
    assert picture == "results/figures/size.png"
    assert (ROOT / picture).is_file()


def test_readme_says_who_leads_and_how_many_claims_hold():
    """The sentences below the table are those of the standings; the counts above it are those of the page of claims."""
    text, claims = read("README.md"), read("results/claims.md")
    means = pd.read_csv(RESULTS / "smollm2-135m/compare/tables/standing.csv")
    for size, part in means.groupby("size"):
        first, level = part.iloc[0], part[part.standing == "level"].method
        said = f"- SmolLM2-135M, {100 * size:.0f} % removed: {first.method} has the lowest perplexity, {first.relative:.3f} times"
        (line,) = [line for line in text.splitlines() if line.startswith(said)]
        assert re.sub(r" \(.*?\)", "", line).endswith(f"level with it: {', '.join(level) or 'none'}.")
    for verdict in ("reproduced", "contradicted", "undecided"):
        for model in ("smollm2-135m", "wiki-a-llama", "wiki-a-opt"):
            (line,) = [line for line in text.splitlines() if line.startswith(f"- On {model}: ")]
            rows = [row for row in claims.splitlines() if f"| {model} |" in row and row.endswith(f"| {verdict} |")]
            assert re.search(rf"\b{len(rows)} {verdict}\b", line), (line, len(rows))
    assert len({row.split("|")[1] for table in tables_of(claims) for row in table[2:]}) >= 25


def test_what_is_missing_is_said():
    assert "n/a: not applicable, or not measured." in " ".join(read("README.md").split())
    rows = [row for row in equal_sizes_at_a_glance() if "n/a" in row]
    assert {row.split("|")[1].strip() for row in rows} == {"SliceGPT", "Wanda-sp, with heads", "MoDeGPT"}
    assert all(row.endswith("| n/a | n/a |") for row in rows)  # of Gemma


def test_time_of_reproduce():
    """Two notebooks at a time, in the profile's order, each as long as its manifest says, with what it had measured before."""
    minutes = int(re.search(r"`invoke reproduce` takes about (\d+) minutes on two", " ".join(read("README.md").split()))[1])
    cores = [0.0, 0.0]
    for paper in tasks.papers_of("workshop", ""):
        manifest = json.loads((RESULTS / "workshop" / paper / "manifest.json").read_text())
        if manifest["cells_from_ledger"] and "seconds_from_ledger" not in manifest:
            pytest.skip("the committed run was resumed by a version that did not record how long the remembered cells took")
        cores[cores.index(min(cores))] += manifest["seconds"] + manifest.get("seconds_from_ledger", 0)
    assert max(cores) / 60 == pytest.approx(minutes, rel=0.25)


@pytest.mark.parametrize("page", ["README.md", "lib/README.md"])
def test_trees_name_what_is_there(page):
    (tree,) = re.findall(r"^```text\n(.*?)^```", read(page), re.M | re.S)
    inside = "  " if page == "README.md" else ""
    first = [re.match(rf"{inside}(\S.*?)(?:\s{{2,}}|$)", line) for line in tree.splitlines()]
    named = {name for found in first if found for name in found[1].split(", ")}
    if page == "README.md":
        for line in tree.splitlines():
            assert line.startswith(" ") or (ROOT / line.split()[0]).exists(), line
    folders = {f"{path.parent.name}/" for path in (ROOT / "lib").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "lib").glob("*.py")} - {"__init__.py"}
    assert named - {"assets/"} == folders | modules


# --- paths, links and commands of all pages -------------------------------------------------------------------------------


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    links = [link for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)", target.read_text(encoding="utf-8"), re.M)), link


def test_paths_exist():
    """Paths in backticks start at the root of the project, on every page."""
    paths = {
        path for page in PAGES for path in re.findall(r"`((?:lib|tests|notebooks|benchmarks|results)/[\w./-]*)`", read(page))
    }
    assert len(paths) > 60
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing == {"lib/baselines/energy.py", "results/workshop-custom/"}  # those that the reader makes


def commands(page: str) -> list[tuple[list[str], bool]]:
    """Every command of a page as its words, and whether it is complete: a line of a block, not a fragment in a sentence."""
    text = read(page)
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    prose = re.sub(r"^```(?:bash|python)\n.*?^```", "", text, flags=re.M | re.S).replace("```", "")
    found = [(line, True) for line in lines] + [(" ".join(code.split()), False) for code in re.findall(r"`([^`]+)`", prose)]
    parts = [(part, whole) for line, whole in found for part in line.split("&&") if re.match(r"\s*(invoke|python -m) ", part)]
    return [(shlex.split(part, comments=True), whole) for part, whole in parts]


CONTEXTS = {name: context for context in Collection.from_module(tasks).to_contexts() for name in (context.name, *context.aliases)}
CORE = {f"--{name}" for argument in Program().core_args() for name in argument.names}


def check_invoke(words: list[str], whole: bool) -> None:
    """Of `invoke WORDS`: the task, its flags, and the names that are given to the flags."""
    if words[0] in CORE:
        assert all(word in CONTEXTS for word in words[1:])
        return
    assert words[0] in CONTEXTS, words
    assert {word for word in words if word.startswith("--")} <= set(CONTEXTS[words[0]].flags), words
    if whole:
        Parser(contexts=list(CONTEXTS.values())).parse_argv(words)
    given = dict(itertools.pairwise(words))
    known = {"--profile": tasks.profiles(), "--paper": tasks.papers(), "--method": [*METHODS, "neuron-energy"]}
    for flag, names in known.items():
        assert flag not in given or given[flag] in names, words
    settings = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    if settings and words[0] == "reproduce":
        tasks.parameters_of(given["--paper"], given.get("--profile", "workshop"), settings)
    elif settings and given.get("--method") != "neuron-energy":  # the one that the reader adds
        settings_of(given.get("--method", "slicegpt"), tasks.named_values(settings))


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    for words, whole in commands(page):
        if words[0] == "invoke":
            check_invoke(words[1:], whole)
        else:
            assert importlib.util.find_spec(words[2]), words
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), words


def test_commands_are_found_and_wrong_ones_rejected():
    assert sum(len(commands(page)) for page in PAGES) > 50
    assert (["invoke", "reproduce"], True) in commands("README.md")
    for wrong in ("reproduces", "reproduce --papers afr", "reproduce --paper nope", "compress --set layuot=dense", "--lists"):
        with pytest.raises((AssertionError, ValueError)):
            check_invoke(wrong.split(), False)
    with pytest.raises(Exception, match="did not receive required positional arguments"):
        check_invoke(["compress", "--ratio", "0.25", "--out", "small"], True)


def test_sections_of_the_workshop_are_those_of_the_notebooks():
    """A row "minutes | section" of a table of the plan names a heading of the notebook in the head of the table."""
    papers = []
    for table in tables_of(read("notebooks/README.md")):
        paper = re.search(r"section of `(\w+)\.ipynb`", table[0])
        if paper:
            cells = json.loads((NOTEBOOKS / f"{paper[1]}.ipynb").read_text(encoding="utf-8"))["cells"]
            lines = "".join("\n" + "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").splitlines()
            headings = {bare(line.lstrip("# ")) for line in lines if line.startswith("## ")}
            sections = [found[1] for row in table if (found := re.match(r"\| \d+ \| (\d+ · [^|]+) \|", row))]
            assert len(sections) >= 2
            assert set(map(bare, sections)) <= headings, paper[1]
            papers.append(paper[1])
    assert papers == ["slicegpt", "svd_llm", "afr", "comp", "compare"]


def test_minutes_of_the_workshop_add_up():
    """Each part begins when the one before it ends, and the tables of a part fill it."""
    plan = read("notebooks/README.md")
    rows = re.findall(r"^\| (\d):(\d\d) \| (\d+) \| ([^|]+) \|", plan, re.M)
    at = 0
    for hour, minute, length, _ in rows:
        assert 60 * int(hour) + int(minute) == at
        at += int(length)
    assert at == 4 * 60
    lengths = {f"{hour}:{minute}": int(length) for hour, minute, length, _ in rows}
    parts = [part for part in re.split(r"^## ", plan, flags=re.M) if "| minutes | section of" in part]
    assert len(parts) == 4
    for part in parts:
        start = re.search(r"\((\d:\d\d)\)", part.splitlines()[0])[1]
        assert sum(map(int, re.findall(r"^\| (\d+) \|", part, re.M))) == lengths[start]


def bare(heading: str) -> str:
    return re.sub(r" \([^)]*\)$", "", heading.strip())


def test_every_benchmark_is_described():
    named = {words[2].split(".")[1] for words, _ in commands("benchmarks/README.md") if words[0] == "python"}
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert named == {name for name in files if name != "__init__" and not name.startswith("literal_")}


def test_pages_and_notebooks_are_where_the_tests_look():
    """No page of the project is left out of the checks above."""
    tracked = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("README.md")}
    for folder in ("lib", "notebooks", "benchmarks", "results", "tests"):
        tracked |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("README.md")}
    assert {page for page in tracked if not page.startswith("lib/assets/") and "-custom/" not in page} == set(PAGES)
    assert NOTEBOOKS == ROOT / "notebooks"
