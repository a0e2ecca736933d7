"""Pieces of HTML that the pages of the site are made of: whole pages, tables, and Markdown with formulas that need no script."""

from __future__ import annotations

import csv
import itertools
import posixpath
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from jinja2 import pass_context
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from lib.suite.results import ROOT, rounded

try:
    from latex2mathml.converter import convert
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("formulas are converted by the package latex2mathml: pip install -e '.[site]'") from error

MENU = {"index.html": "Start", "explorer.html": "Explorer", "claims.html": "Claims"}  # pages that every page links to
# The first of ten Unicode digits in each style: browsers ignore `mathvariant` on numbers, and would show 𝟏𝟏 as eleven.
DIGITS = {"bold": "𝟎", "double-struck": "𝟘", "sans-serif": "𝟢", "bold-sans-serif": "𝟬", "monospace": "𝟶"}


def page(title: str, body: str, up: str = "../../", links: str = "", scripts: Iterable[str] = (), kind: str = "") -> str:
    """A whole HTML page.

    up: the relative path from its folder to the root of the site. links: what its menu has beside `MENU`. scripts: files in
    the root that run after that of every page. kind: class of the body.
    """
    menu = "".join(f'<a href="{up}{path}">{name}</a>' for path, name in MENU.items())
    menu = f'<nav class="menu" aria-label="Pages">{menu}{links}</nav>'
    run = "".join(f'<script src="{up}{name}"></script>\n' for name in ("page.js", *scripts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<link rel="stylesheet" href="{up}style.css">\n'
        f'</head>\n<body class="{kind}">\n{menu}\n{body}\n{run}</body>\n</html>\n'
    )


def scrolling(table: str, name: str = "Table") -> str:
    """A table in a box of its own, in which it scrolls sideways where the page is narrower; keyboards reach the box, too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


def boxed(html: str) -> str:
    """Every table of some HTML in its scrolling box; one whose first column reaches over several rows keeps it in another way."""

    count = itertools.count(1)

    def box(found: re.Match) -> str:
        kind = ' class="grouped"' if "rowspan=" in found[0] else ""
        return f"<div{kind}>{scrolling(found[0], f'Table {next(count)}')}</div>"

    return re.sub(r"<table.*?</table>", box, html, flags=re.DOTALL)


def sortable(path: Path) -> str:
    """A csv file as a sortable HTML table: values are shown rounded, and in full in the title and for sorting."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return sortable_rows(header, rows, path.stem.replace("_", " ").capitalize())


def sortable_rows(header: list[str], rows: Iterable[list[str]], name: str) -> str:
    """The same for rows of text."""

    def cell(text: str) -> tuple[str, bool]:
        try:
            shown = rounded(float(text))
        except ValueError:
            return f"<td>{escape(text)}</td>", False
        return f'<td class="number" data-value="{text}" title="{text}">{shown}</td>', True

    body = [[cell(text) for text in row] for row in rows]
    numbers = [any(row[i][1] for row in body) for i in range(len(header))]
    head = "".join(
        f"<th{' class=number' if number else ''}><button>{escape(name)}</button></th>"
        for name, number in zip(header, numbers, strict=True)
    )
    lines = "".join("<tr>" + "".join(html for html, _ in row) + "</tr>\n" for row in body)
    return scrolling(f'<table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table>', name)


def mathml(formula: str, display: str = "inline") -> str:
    """A formula in TeX as MathML, whose bold and other special digits are characters of their own."""

    def digits(found: re.Match) -> str:
        first = ord(DIGITS.get(found[1], "0"))
        return "<mn>" + re.sub(r"\d", lambda digit: chr(first + int(digit[0])), found[2]) + "</mn>"

    return re.sub(r'<mn mathvariant="([a-z-]+)">([^<]*)</mn>', digits, convert(formula, display=display))


class Renderer(IPythonRenderer):
    """Markdown of a notebook to HTML that needs no script: formulas as MathML, links to code as pages below `code`.

    `papers` are the notebooks whose pages are neighbours of this one. A link to a file without a page becomes plain text: slides
    are used alone, code can have moved since the run, and a profile may leave out notebooks.
    """

    code, papers = "", frozenset()

    def inline_math(self, body: str) -> str:
        return f'<span class="formula inline">{mathml(body)}</span>'

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{mathml(body, "block")}</span>'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if ":" in url or url.startswith("#"):
            return super().link(text, url, title)
        path, mark, anchor = url.replace("../", "").partition("#")
        paper = Path(path).stem
        if path.endswith(".ipynb") and paper in self.papers:
            return super().link(text, f"../{paper}/notebook.html{mark}{anchor}", title)
        if self.code and path.startswith("lib/") and (ROOT / path).exists():
            return super().link(text, f"{self.code}/{path}.html", title)
        return text


class Readme(Renderer):
    """Markdown of a file in the repository's folder `folder`: a link to a file leads to its page, of {file: page} in `pages`.

    up: the relative path from the page to the root of the site. A link to a file without a page becomes plain text.
    """

    folder, pages, up = "", {}, ""

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if ":" in url or url.startswith("#"):
            return super().link(text, url, title)
        target = self.pages.get(posixpath.normpath(posixpath.join(self.folder, url.partition("#")[0])))
        return f'<a href="{self.up}{target}">{text}</a>' if target else text


def readme_page(path: Path, folder: str, pages: Mapping[str, str], up: str) -> str:
    """A README as a page of the site; folder: where it is in the repository, pages, up: as `Readme` has them."""
    renderer = Readme(escape=False)
    renderer.folder, renderer.pages, renderer.up = folder, pages, up
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)", text, re.MULTILINE)
    body = MarkdownWithMath(renderer=renderer).render(text)
    return page(title[1] if title else folder, f'<main class="text_cell_render">\n{boxed(body)}\n</main>', up)


class Words:
    """How an exporter of pages converts Markdown."""

    code, papers = "", frozenset()

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        renderer = Renderer(escape=False)
        renderer.code, renderer.papers = self.code, self.papers
        return MarkdownWithMath(renderer=renderer).render(source)
