"""Slides: few words, one figure or a small table each, no more than fits, and measured claims only as they were printed."""

import base64
import json
import re
import shutil
from html import unescape

import nbformat
import pytest

from lib.suite import slides
from lib.suite.results import RESULTS, ROOT
from lib.suite.site import read_run
from lib.suite.slides import KEYS, PARTS, ROWS, WORDS, build_slides, deck
from tests.test_prose import known_to, measured_looking
from tests.test_site import BROWSER, Page, browse

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAPERS = [path.stem for path in NOTEBOOKS]
RUN = RESULTS / "workshop" / "slicegpt"


def stored(paper):
    """The notebook as it is stored, in the place of an executed one: every cell is there."""
    run = read_run(RESULTS / "workshop" / paper)
    run.notebook = nbformat.read(ROOT / "notebooks" / f"{paper}.ipynb", as_version=4)
    return run


def made_up(monkeypatch, tmp_path, cells):
    """A run of a notebook of these cells: (source, what its slide says, outputs), text where there are no outputs."""
    new = nbformat.v4
    made = [new.new_markdown_cell("# A notebook\n\n*Somebody: a paper.*\n\nIts prose.", id="top")]
    for i, (source, words, outputs) in enumerate(cells):
        cell = new.new_markdown_cell(source) if outputs is None else new.new_code_cell(source, outputs=outputs)
        cell.update(id=f"c{i}", metadata={"slide": words} if words else {})
        made.append(cell)
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new.new_notebook(cells=made), tmp_path / "notebooks" / "slicegpt.ipynb")
    monkeypatch.setattr(slides, "ROOT", tmp_path)
    run = read_run(RUN)
    run.notebook = nbformat.read(tmp_path / "notebooks" / "slicegpt.ipynb", as_version=4)
    return run


def printed(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def shown(html):
    return nbformat.v4.new_output("display_data", data={"text/html": html, "text/plain": "a table"})


def text_of(slide):
    return unescape(re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", " ".join([slide.title, *slide.parts])))).strip()


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("made", [lambda paper: read_run(RESULTS / "workshop" / paper), stored], ids=["run", "stored"])
def test_a_deck_is_short_and_no_slide_is_crowded(paper, made):
    found = deck(made(paper))
    assert 15 <= len(found) <= 25
    for slide in found:
        html = "".join(slide.parts)
        assert slide.words <= WORDS == 40, text_of(slide)
        rows = len(re.findall("<tr", html.partition("<tbody>")[2]))
        assert rows <= ROWS == 8, text_of(slide)
        assert html.count("<img") + html.count("<table") <= 1, text_of(slide)
        assert slide.title.strip()
    assert sum(slide.kind == "question" for slide in found) >= 5
    assert sum("fragment" in slide.html for slide in found) >= 1
    assert sum(len(slide.notes) > 0 for slide in found) > len(found) / 2


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if paper != "compare"])
def test_the_exercises_behind_the_toy_are_questions_with_answers(paper):
    toy = [slide for slide in deck(stored(paper)) if slide.section == "section 1" and "fragment" in slide.html]
    assert len(toy) >= 2
    assert any("<code>return " in slide.html for slide in toy)  # the line that is to be filled in


@pytest.mark.parametrize("path", NOTEBOOKS, ids=PAPERS)
def test_what_is_written_by_hand_quotes_no_measurement(path):
    """A claim that was measured becomes a title by `says`, from what was printed."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    known, seen = known_to(notebook, path.stem), 0
    for cell in notebook["cells"]:
        words = cell["metadata"].get("slide", {})
        assert set(words) <= KEYS, cell["id"]
        by_hand = " ".join(value for key, value in words.items() if key != "says")
        assert measured_looking(by_hand, known) == [], cell["id"]
        seen += bool(words)
    assert seen >= 10


def test_says_patterns_find_their_sentences():
    """Each pattern matches what its section printed, or its slide would lose its claim unseen."""
    for path in NOTEBOOKS:
        run, section, waiting = stored(path.stem), [], []
        for cell in [*run.notebook.cells, nbformat.v4.new_markdown_cell("## End")]:
            if cell.cell_type == "markdown" and re.search(r"(?m)^## ", cell.source):
                for pattern in waiting:
                    assert any(re.search(pattern, line.strip()) for line in section), (path.stem, pattern)
                section, waiting = [], []
            section += [line for out in cell.get("outputs", []) for line in out.get("text", "").splitlines()]
            waiting += [cell.metadata["slide"]["says"]] if "says" in cell.metadata.get("slide", {}) else []


def test_a_measured_claim_is_what_was_printed(monkeypatch, tmp_path):
    lines = "m at 10%: perplexity 5.00\nm: A is 3.1 % below B.\nm: C is level with D.\nn: A is above B: +2 %.\n"
    run = made_up(monkeypatch, tmp_path, [("## 1 · Two", {}, None), ("f()", {"says": "A is .* B"}, [printed(lines)])])
    _, slide, _ = deck(run)
    assert slide.title == "m: A is 3.1 % below B"
    assert text_of(slide) == "m: A is 3.1 % below B n: A is above B: +2 %."
    assert slide.section == "section 1"
    (outputs := run.notebook.cells[2].outputs)[0].text = lines.replace("3.1 % below", "level with")
    assert deck(run)[1].title == "m: A is level with B"
    outputs[0].text = "m: A is above B, and nothing else.\n"
    assert [text_of(slide) for slide in deck(run)[1:-1]] == ["m: A is above B, and nothing else"]
    outputs[0].text = "nothing of the kind\n"
    assert len(deck(run)) == 2, "no claim, no slide"


def test_prose_is_in_the_notes_of_the_slide_that_it_belongs_to(monkeypatch, tmp_path):
    cells = [
        ("## 1 · One\n\nBefore the first.", {}, None),
        ("f()", {"title": "First"}, [printed("1\n")]),
        ("Behind the first.", {}, None),
        ("**Second.** What comes next.", {}, None),
        ("setup()", {}, []),
        ("After the set-up.\n\n## 2 · Two\n\nA new section.", {"question": "How many?", "answer": "Two."}, None),
        ("g()", {"title": "Second"}, [printed("2\n")]),
        ("## 3 · Exercises\n\nNot shown.", {"question": "Shown?"}, None),
    ]
    found = deck(made_up(monkeypatch, tmp_path, cells))
    notes = {text_of(slide).split(" Somebody")[0]: " ".join("".join(slide.notes).split()) for slide in found[:-1]}
    assert notes == {
        "A notebook": "*Somebody: a paper.* Its prose.",
        "First 1": "## 1 · One Before the first.Behind the first.",
        "Question How many? Two.": "**Second.** What comes next.After the set-up. ## 2 · Two A new section.",
        "Second 2": "",
    }
    assert found[2].section == "section 2"
    assert '<div class="answer fragment"><p>Two.</p>' in found[2].html


def test_what_is_too_much_is_cut_and_said(monkeypatch, tmp_path):
    rows = "".join(f"<tr><th>row{i}</th><td>NaN</td><td>{i}</td></tr>" for i in range(20))
    small = f"<style></style><table><thead><tr><th>a</th><th>b</th><th>c</th></tr></thead><tbody>{rows}</tbody></table>"
    wide = small.replace("<td>NaN</td>", "<td>1234567.8901</td>" * 15)
    sentences = "".join(f"claim {i} with quite some words in it, as sentences have them\n" for i in range(9))
    cells = [
        ("f()", {"title": "A table"}, [shown(small)]),
        ("f()", {"title": "Too wide", "says": "claim"}, [shown(wide), printed(sentences)]),
        ("f()", {"title": "Numbers"}, [printed("".join(f"{i} 0.00\n" for i in range(60)))]),
        ("f()", {"title": "Heard", "says": "times dense"}, [printed(f"m 5%, 9 times dense: {'word ' * 40}\n")]),
    ]
    _, table, sentences, numbers, spoken, _ = deck(made_up(monkeypatch, tmp_path, cells))
    html = "".join(table.parts)
    assert html.count("<tr>") == 1 + ROWS
    assert "The first 8 of 20 rows." in html
    assert "NaN" not in html
    assert "<table" not in "".join(sentences.parts)
    assert 20 < sentences.words <= WORDS
    assert "claim 8" in "".join(sentences.notes), "what does not fit is in the notes"
    assert "claim 8" not in "".join(sentences.parts)
    assert "".join(numbers.parts).count("0.00") == slides.LINES
    assert "".join(spoken.parts).count("word") == slides.HEARD
    assert "…" in "".join(spoken.parts)


def test_a_slide_without_outputs_is_left_out_with_its_question(monkeypatch, tmp_path):
    cells = [("f()", {"title": "T", "question": "Q?"}, [printed("1\n")]), ("Prose.", {"question": "R?"}, None)]
    run = made_up(monkeypatch, tmp_path, cells)
    assert [text_of(slide) for slide in deck(run)[1:3]] == ["Question Q?", "T 1"]
    run.notebook.cells = [cell for cell in run.notebook.cells if cell.id != "c0"]
    assert [text_of(slide) for slide in deck(run)[1:-1]] == ["Question R?"]


def test_a_high_picture_stands_beside_the_words(monkeypatch, tmp_path):
    def drawn(kind, data):
        return nbformat.v4.new_output("display_data", data={kind: data, "text/plain": "a figure"})

    def png(width, height):
        head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big")
        return base64.b64encode(head).decode()

    svg = '<svg viewBox="0 0 {} {}"><title>What &amp; how</title></svg>'
    pictures = [drawn("image/png", png(300, 200)), drawn("image/png", png(200, 300))]
    pictures += [drawn("image/svg+xml", svg.format(30.5, 20)), drawn("image/svg+xml", svg.format(20, 30.5))]
    cells = [("f()", {"title": "A figure"}, [picture]) for picture in pictures]
    found = deck(made_up(monkeypatch, tmp_path, cells))[1:-1]
    assert [slide.kind for slide in found] == ["", "tall", "", "tall"]
    names = [re.search('alt="(.*?)"', slide.html)[1] for slide in found]
    assert names == ["Plot: A figure", "Plot: A figure", "What &amp; how", "What &amp; how"]


def stub_of_reveal(folder):
    for part in PARTS:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text("/* stands for reveal.js */\n")
    return folder


def test_pages_are_whole_and_load_reveal_alone(tmp_path):
    reveal = stub_of_reveal(tmp_path / "reveal")
    for paper in ("slicegpt", "compare"):
        path = build_slides(RESULTS / "workshop" / paper, tmp_path / "site", reveal)
        page = Page(path)
        assert page.faults == []
        loaded = [source for source in page.loaded if not source.startswith("data:")]
        assert sorted(loaded) == sorted(f"reveal.js/{part}" for part in PARTS)
        assert all((path.parent / source).is_file() for source in loaded)
        assert all(found.get("alt") for tag, found in page.elements if tag == "img")
        assert "import matplotlib" not in page.text
        assert page.text.count("How the numbers were made") == 1
    online = Page(build_slides(RUN, tmp_path / "site"))
    assert {source for source in online.loaded if not source.startswith("data:")} == {f"{slides.REVEAL}/{part}" for part in PARTS}


@pytest.mark.parametrize("missing", PARTS)
def test_a_folder_that_is_not_reveal_is_refused(tmp_path, missing):
    reveal = stub_of_reveal(tmp_path / "reveal")
    (reveal / missing).unlink()
    with pytest.raises(ValueError, match=f"holds no {missing}"):
        build_slides(RUN, tmp_path / "site", reveal)
    assert not (tmp_path / "site").exists()


FITS = """(window, inside) => [...inside.querySelectorAll(".slide")].map((slide) => {
  const box = slide.getBoundingClientRect(), inner = [...slide.querySelectorAll("*:not(math *)")];
  const out = inner.filter((part) => {
    const at = part.getBoundingClientRect();
    const empty = at.width * at.height === 0 && part.matches("img, table, pre");
    return at.bottom > box.bottom + 1 || at.right > box.right + 1 || empty;
  });
  const small = [...slide.querySelectorAll("img")].some((img) => img.getBoundingClientRect().height < 250);
  const over = [slide.scrollWidth - slide.clientWidth, slide.scrollHeight - slide.clientHeight];
  return { name: slide.innerText.slice(0, 80), size: [box.width, box.height], small, over, out: out.map((part) => part.tagName) };
})"""


@pytest.mark.skipif(not BROWSER, reason="needs the browser chromium")
@pytest.mark.parametrize("paper", PAPERS)
def test_no_slide_overflows(tmp_path, paper):
    """At 1280 x 720, which reveal.js then makes larger or smaller as a whole."""
    run = stored(paper)
    for folder, notebook in (("run", None), ("stored", run.notebook)):
        out = tmp_path / folder
        source = tmp_path / "results" / folder / paper
        shutil.copytree(RESULTS / "workshop" / paper, source)
        if notebook:
            nbformat.write(notebook, source / f"{paper}.ipynb")
        path = build_slides(source, out, stub_of_reveal(tmp_path / "reveal"))
        for _, _, found in browse(out, tmp_path / "browser", [path.relative_to(out).as_posix()], FITS):
            assert 15 <= len(found) <= 25
            for slide in found:
                assert slide["size"] == [1280, 720]
                assert slide["over"] == [0, 0], slide["name"]
                assert slide["out"] == [], slide["name"]
                assert not slide["small"], slide["name"]
