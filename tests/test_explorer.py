"""The explorer says what the committed tables say: its script is run by Node, without a page, and compared with pandas."""

import functools
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest

from lib.suite import explorer, plots
from lib.suite.results import RESULTS
from lib.suite.site import ASSETS

FOLDERS = [path.parent for path in sorted(RESULTS.glob("*/compare/manifest.json"))]
COMPARISONS = {folder.parent.name: folder for folder in FOLDERS if folder.parent.name != "interactive"}
TABLES = {
    profile: {path.stem: pd.read_csv(path) for path in folder.glob("tables/*.csv")} for profile, folder in COMPARISONS.items()
}
MODELS = [(profile, model) for profile, tables in TABLES.items() for model in tables["pareto"].model.unique()]
CODE = (ASSETS / "explorer.js").read_text()
SVG = "{http://www.w3.org/2000/svg}"
node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node")


@functools.cache
def committed():
    """The script's tables of all committed comparisons."""
    return explorer.script(COMPARISONS)


def run(tables, expression):
    """What an expression of JavaScript is worth where the script and its tables are loaded."""
    source = f"{tables}\n{CODE}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "-"], input=source, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def everything():
    """{profile/model: {measure: {size: {points, missing}}}} as the script has it, for every choice that it offers."""
    every = """Object.fromEntries(modelsOf(SUITE).map(({ id, profile, model }) => [id, Object.fromEntries(
      choice(SUITE, { model: id }).axes.map((axis) => [axis, Object.fromEntries(
        choice(SUITE, { model: id, axis }).sizes.map((size) => [size, pointsOf(SUITE, { profile, model, axis, size })]))]))]))"""
    return run(committed(), every)


def table(profile, model, name):
    """The rows of a model in a table, by (method, size); an empty table where there is none."""
    frame = TABLES[profile].get(name, pd.DataFrame(columns=["model", "method", "size"]))
    return frame[(frame.model == model) & (frame.method != "dense")].set_index(["method", "size"]).sort_index()


def values(found, name="value"):
    return {(point["method"], float(size)): point.get(name) for size, part in found.items() for point in part["points"]}


def test_there_is_something_to_explore():
    assert {profile for profile, _ in MODELS} == set(COMPARISONS) >= {"workshop", "gemma-3-270m"}


@node
@pytest.mark.parametrize(("profile", "model"), MODELS)
def test_perplexity_is_the_mean_over_draws_where_it_was_taken_and_else_that_of_one(everything, profile, model):
    once, standing, seeds = (table(profile, model, name) for name in ("pareto", "standing", "seeds"))
    dense = TABLES[profile]["pareto"].query("model == @model and method == 'dense'").perplexity.item()
    found = everything[f"{profile}/{model}"]["perplexity"]
    points = {(p["method"], float(size)): p for size, part in found.items() for p in part["points"]}
    assert set(points) == set(once.index[once.relative.notna()])
    with_interval = 0
    for key, point in points.items():
        row = standing.loc[key] if key in standing.index else once.loc[key]
        assert point["value"] == pytest.approx(row.relative, rel=1e-12), key
        assert point["removed"] == once.removed_decoder[key]
        assert point["standing"] == (row.standing if key in standing.index else None)
        if "low" in row and row.low == row.low:
            assert (point["low"], point["high"]) == pytest.approx((row.low, row.high), rel=1e-12), key
        elif "perplexity" in seeds and len(drawn := seeds.perplexity[[key]]) > 1:
            assert (point["low"], point["high"]) == pytest.approx((drawn.min() / dense, drawn.max() / dense), rel=1e-12), key
        with_interval += point.get("low") is not None
    assert with_interval > len(points) / 2
    for part in found.values():
        numbers = [point["value"] for point in part["points"]]
        assert numbers == sorted(numbers)


@node
@pytest.mark.parametrize(("profile", "model"), MODELS)
def test_other_measures_are_the_tables_columns(everything, profile, model):
    found, tables = everything[f"{profile}/{model}"], TABLES[profile]
    size = float(json.loads((COMPARISONS[profile] / "manifest.json").read_text())["parameters"]["size"])
    for axis, name, column in (
        ("seconds", "cost", f"seconds_{model}"),
        ("memory", "cost", "peak_mb"),
        ("decode", "latency", "decode_speedup"),
        ("prefill", "latency", "prefill_speedup"),
    ):
        measured = tables[name].dropna(subset=column).set_index("method")[column]
        assert values(found[axis]) == {(method, size): value for method, value in measured.items()}
    once, asked = table(profile, model, "pareto"), table(profile, model, "other_measures")
    params = tables["pareto"].query("model == @model and method == 'dense'").params.item()
    assert values(found["kept"]) == pytest.approx((once.params / params).to_dict())
    assert values(found.get("kl", {})) == asked.get("kl", pd.Series(dtype=float)).to_dict()
    right = once.accuracy.dropna().to_dict() if "accuracy" in once else {}
    for column in asked.columns:
        if column.startswith("accuracy_"):
            right |= {(method, float(column[9:])): value for (method, _), value in asked[column].items()}
    assert values(found["accuracy"]) == right
    for column in [name for name in asked.columns if name.startswith("low_accuracy_")]:
        size = float(column.removeprefix("low_accuracy_"))
        dense = asked[f"accuracy_{size}"] - asked[f"change_accuracy_{size}"]
        ends = {(method, size): value for (method, _), value in (dense + asked[column]).items()}
        assert {key: values(found["accuracy"], "low")[key] for key in ends} == pytest.approx(ends)
    if "stderr" in once:
        half = {key: (found - values(everything[f"{profile}/{model}"]["accuracy"], "low")[key]) for key, found in right.items()}
        assert half == pytest.approx((1.96 * once.stderr).dropna().to_dict())


@node
def test_the_best_comes_first_whichever_end_is_better(everything):
    for measures in everything.values():
        for axis, best in (("accuracy", max), ("decode", max), ("seconds", min), ("kept", min)):
            for part in measures[axis].values():
                assert part["points"][0]["value"] == best(point["value"] for point in part["points"]), axis


@node
def test_colours_are_those_of_the_figures(everything):
    for measures in everything.values():
        for part in measures["perplexity"].values():
            assert all(point["removes"] == plots.style_of(point["method"]).removes for point in part["points"])
    assert explorer.suite(COMPARISONS)["colours"] == plots.COLOURS


@node
def test_a_link_keeps_the_choice_and_a_wrong_one_leads_somewhere():
    wishes = [
        {"model": "gemma-3-270m/gemma-3-270m", "size": "0.5", "axis": "accuracy"},
        {"model": "workshop/wiki-a-opt", "size": "0.3", "axis": "perplexity"},
        {"model": "workshop/wiki-a-opt", "size": "0.5", "axis": "decode"},
        {"model": "no/such", "size": "half", "axis": "beauty"},
        {},
        {"model": "workshop/wiki-a-llama", "size": "1", "axis": "filePerplexity"},
    ]
    kept = "({ id, size, axis }) => ({ model: id, size: String(size), axis })"
    again = f"{json.dumps(wishes)}.map((wish) => ({kept})(choice(SUITE, readLink(writeLink(choice(SUITE, wish))))))"
    found = run(committed(), again)
    assert found[:2] == wishes[:2]
    assert found[2] == wishes[2] | {"size": "0.2"}, "speed was measured at 20 % alone"
    first = "/".join(MODELS[0])
    assert found[3] == found[4] == {"model": first, "size": "0.2", "axis": "perplexity"}
    files = TABLES["workshop"]["device"].query("model == 'wiki-a-llama'")
    least = files.groupby(["kind", "size"]).mb.max().min()
    assert found[5]["size"] == str(rounded_up(1e6 * least)), "the smallest that all methods reach with one kind and share"


def rounded_up(size):
    """A number of bytes to three digits, so that what fits still does."""
    unit = 10 ** (len(str(int(size))) - 3)
    return math.ceil(size / unit) * unit


@node
@pytest.mark.parametrize(("profile", "model"), MODELS)
def test_files_of_llama_cpp_are_shown_where_they_were_measured(everything, profile, model):
    found = everything[f"{profile}/{model}"]
    files = TABLES[profile].get("device", pd.DataFrame(columns=["model"])).query("model == @model")
    for axis, name in (("filePerplexity", "times_dense"), ("fileBytes", "mb"), ("fileDecode", "decode_tokens_per_s")):
        expected = {}
        for size in sorted(set(files.get("size", ())) - {0}):
            part = files[files["size"].isin([0, size])]
            expected |= {(f"{row.method}, {row.kind}", size): getattr(row, name) for row in part.itertuples()}
        assert values(found.get(axis, {})) == expected
    for part in found.get("filePerplexity", {}).values():
        assert all(point["low"] <= point["value"] <= point["high"] for point in part["points"])
        assert {point["bytes"] for point in part["points"]} <= {1e6 * mb for mb in files.mb}


def test_there_are_files_to_show():
    assert "device" in TABLES["workshop"]


def models_in_bytes(profile, model, axis):
    """The models that a size in bytes chooses among: name, share, bytes, value."""
    if axis == "perplexity":
        rows = TABLES[profile]["pareto"].query("model == @model and method != 'dense'").dropna(subset="relative")
        return pd.DataFrame({"name": rows.method, "size": rows["size"], "bytes": rows.bytes, "removed": rows.removed_decoder})
    rows = TABLES[profile]["device"].query("model == @model")
    return pd.DataFrame({"name": rows.method + ", " + rows.kind, "size": rows["size"], "bytes": 1e6 * rows.mb, "removed": None})


@node
@pytest.mark.parametrize(
    ("profile", "model", "axis"),
    [(*found, "perplexity") for found in MODELS] + [("workshop", "wiki-a-llama", "filePerplexity")],
)
def test_a_size_in_bytes_takes_the_largest_model_of_each_method_that_fits(profile, model, axis):
    wish = json.dumps({"model": f"{profile}/{model}", "axis": axis})
    ask = f"choice(SUITE, {wish}).budgets.map((size) => [size, pointsOf(SUITE, choice(SUITE, {{ ...{wish}, size }}))])"
    found, rows = run(committed(), ask), models_in_bytes(profile, model, axis)
    budgets = [size for size, _ in found]
    assert budgets == sorted(set(budgets), reverse=True)
    if axis == "perplexity":
        near = rows[(rows.removed - rows["size"]).abs() < plots.NEAR]
        assert set(budgets) == {rounded_up(part.bytes.max()) for _, part in near.groupby("size")}
    for budget, part in found:
        fitting = rows[rows.bytes <= budget].sort_values(["bytes", "size"], ascending=[False, True]).drop_duplicates("name")
        assert {point["method"]: point["bytes"] for point in part["points"]} == pytest.approx(
            dict(fitting[["name", "bytes"]].values)
        )
        assert set(part["missing"]) == set(rows.name) - set(fitting.name)
        assert {point["standing"] for point in part["points"]} <= {None}, "who leads is about models of one size"
    picture = run(committed(), draw(f"choice(SUITE, {{ ...{wish}, size: {budgets[-1]} }})"))
    words = ElementTree.fromstring(picture).get("aria-label")
    assert words.startswith(f"{model}, {'weights' if axis == 'perplexity' else 'file'} of at most ")
    best = min(found[-1][1]["points"], key=lambda point: point["value"])
    assert f"lowest perplexity{'' if axis == 'perplexity' else ' in llama.cpp'} with {best['method']}, " in words


def comparison(folder, **tables):
    """A run of the comparison with these tables, each a list of rows."""
    (folder / "tables").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"parameters": {"size": 0.2}}))
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(folder / "tables" / f"{name}.csv", index=False)
    return folder


def swept(method, size, relative, **more):
    common = {"model": "m", "method": method, "size": size, "perplexity": 20 * relative, "relative": relative}
    return common | {"params": 100 - 50 * size, "removed_decoder": size} | more


@node
def test_whatever_tables_and_columns_there_are_are_shown(tmp_path):
    bare = comparison(tmp_path / "bare", pareto=[swept("dense", 0.0, 1.0), swept("A", 0.2, 1.5)])
    second = {"c4_perplexity": 30, "c4_times_dense": 1.25, "c4_low": 1.2, "c4_high": 1.3}
    rows = [swept("dense", 0.0, 1.0, **second), swept("A", 0.2, 1.5, **second), swept("B", 0.2, math.inf), swept("A", 0.5, 3.0)]
    says = [{"model": "m", "method": "A", "ratio": 0.2, "times_dense": 1.5, "says": "and the <b>sea</b>"}]
    healing = [
        {
            "model": "m",
            "method": "A",
            "size": 0.5,
            "learns_from": aim,
            "before": 3.0,
            "after": after,
            "low": after - 0.1,
            "high": 2.5,
        }
        for aim, after in (("next token", 2.0), ("dense model", 1.8))
    ]
    full = comparison(tmp_path / "full", pareto=rows, says=says, healing=healing)
    tables = explorer.script({"bare": bare, "full": full, "none": comparison(tmp_path / "none")})
    found, (c4_sizes, c4) = run(
        tables,
        """[modelsOf(SUITE).map(({ id }) => [id, choice(SUITE, { model: id }).axes]),
        [choice(SUITE, { model: 'full/m', axis: 'c4', size: 0.5 }).sizes,
         pointsOf(SUITE, choice(SUITE, { model: 'full/m', axis: 'c4' }))]]""",
    )
    assert found == [["bare/m", ["perplexity", "kept"]], ["full/m", ["perplexity", "healed", "distilled", "kept", "c4"]]]
    assert (c4_sizes, c4["missing"]) == ([0.2], ["B"])
    [point] = c4["points"]
    assert (point["method"], point["value"], point["low"], point["high"]) == ("A", 1.25, 1.2, 1.3)
    assert point["says"] == "and the <b>sea</b>"
    assert "&lt;b&gt;sea" in run(tables, f"tableRow({json.dumps(point)}, MEASURES.perplexity)")
    for axis, value in (("healed", 2.0), ("distilled", 1.8)):
        chosen = f"choice(SUITE, {{ model: 'full/m', axis: '{axis}' }})"
        sizes, part = run(tables, f"[{chosen}.sizes, pointsOf(SUITE, {chosen})]")
        assert sizes == [0.5]
        [point] = part["points"]
        assert (point["method"], point["value"], point["low"], point["high"]) == ("A", value, value - 0.1, 2.5)
    drawn = run(tables, draw("choice(SUITE, { model: 'full/m', size: 0.2 })"))
    assert len(list(ElementTree.fromstring(drawn).iter(SVG + "path"))) == 1, "an infinite perplexity is an arrow at the edge"


@node
def test_nothing_to_show_is_no_error():
    assert run(explorer.script({}), "choice(SUITE, {})") is None


def draw(choice, width=800):
    """The expression that draws a choice."""
    return f"""(() => {{
      const chosen = {choice}, profile = SUITE.profiles[chosen.profile], measure = measuresOf(profile)[chosen.axis];
      const {{ points }} = pointsOf(SUITE, chosen), title = headline(SUITE, points, measure, chosen);
      const look = {{ size: chosen.size, title, dense: measure.dense?.(profile, chosen.model), width: {width} }};
      return chart(SUITE, points, measure, look).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ');
    }})()"""


@node
@pytest.mark.parametrize("width", [340, 1000])
def test_every_choice_is_drawn_within_the_picture(everything, width):
    choices = [(id, axis, size) for id, axes in everything.items() for axis, sizes in axes.items() for size in sizes]
    drawn = [draw(f"choice(SUITE, {json.dumps({'model': m, 'axis': a, 'size': s})})", width) for m, a, s in choices]
    pictures = run(committed(), f"[{','.join(drawn)}]")
    for (model, axis, size), picture in zip(choices, pictures, strict=True):
        assert "NaN" not in picture
        assert "undefined" not in picture
        root = ElementTree.fromstring(picture)
        points = everything[model][axis][size]["points"]
        groups = root.findall(SVG + "g")
        assert [group.find(SVG + "text").text for group in groups] == [point["method"] for point in points]
        dots = [group.find(SVG + "circle") for group in groups]
        places = [float(dot.get("cx")) for dot in dots if dot is not None]
        assert places == sorted(places) or places == sorted(places, reverse=True), (model, axis, size)
        assert all(158 <= x <= width - 116 for x in places)
        cut = [point["method"] for point in points if axis in ("perplexity", "c4") and point["value"] > plots.TOP]
        assert [point["method"] for point, dot in zip(points, dots, strict=True) if dot is None] == cut
        for point, dot in zip(points, dots, strict=True):
            hollow = point["removed"] is not None and abs(point["removed"] - float(size)) >= plots.NEAR
            assert dot is None or ("--page" in dot.get("style")) == hollow
        assert sum(line.get("class") == "grid" for line in root.findall(SVG + "line")) >= 2, (model, axis, size)
        assert root.get("aria-label").startswith(model.split("/")[1])


@node
def test_the_headline_names_the_best_of_those_that_reached_the_size_and_its_equals(everything):
    standings = {found: table(*found, "standing") for found in MODELS}
    shown = [(*found, size) for found, standing in standings.items() for size in {size for _, size in standing.index}]
    assert shown
    wishes = [json.dumps({"model": f"{profile}/{model}", "size": size, "axis": "perplexity"}) for profile, model, size in shown]
    pictures = run(committed(), f"[{','.join(draw(f'choice(SUITE, {wish})') for wish in wishes)}]")
    for (profile, model, size), picture in zip(shown, pictures, strict=True):
        words = ElementTree.fromstring(picture).get("aria-label")
        part = standings[profile, model].xs(size, level="size")
        assert f"lowest perplexity with {part.index[part.standing == 'first'].item()}," in words
        for method in part.index[part.standing == "level"]:
            assert re.search(rf"level with it: .*{re.escape(method)}", words)


@node
@pytest.mark.parametrize("log", [True, False])
def test_ticks_are_round_and_inside(log):
    ranges = [(1, 1.05), (1, 41), (0.01, 9), (0.3, 0.95), (20, 180), (1, 1.4), (0.9, 40), (1, 2.1)]
    every = run("", f"{json.dumps(ranges)}.map((range) => ticks(range, {json.dumps(log)}, 6))")
    for (low, high), found in zip(ranges, every, strict=True):
        assert found == sorted(set(found))
        assert all(low <= tick <= high for tick in found)
        assert 2 <= len(found) <= 6
        assert all(float(f"{tick:.3g}") == tick for tick in found)


@node
def test_numbers_are_written_to_the_digits_that_matter():
    cases = {
        (1.0649, "times dense"): "1.06", (0.4083, "nats"): "0.408", (1234.5, "MB"): "1,235", (2.1e8, "times dense"): "2e8",
        (0.7540, "%"): "75.4 %", (None, "MB"): "",
    }  # fmt: skip
    found = run("", f"{json.dumps(list(cases))}.map(([value, unit]) => written(value, {{ unit }}))")
    assert dict(zip(cases, found, strict=True)) == cases
