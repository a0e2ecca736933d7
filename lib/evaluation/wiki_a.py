"""wiki-a: real encyclopedic English, which arrives with the gensim wheel."""

from __future__ import annotations

import bz2
import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

WIKI_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKI_A_SHA256 = "2fe1d0ca0beb87128efa16858cbff481e7aa02e08fce7e9f522a5265808405d1"  # of the articles as JSON
WIKI_DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_LISTS_FROM_HERE = {
    "references", "notes", "external links", "see also", "further reading", "bibliography", "footnotes", "sources",
    "citations",
}  # fmt: skip
_SHORTEST_PARAGRAPH, _SHORTEST_ARTICLE = 60, 1000  # characters; shorter ones are table cells and disambiguation stubs


@functools.cache
def wiki_a_articles() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(title, rows) of the 100 articles of gensim's sample Wikipedia dump, in dump order; the title is the first row.

    Markup is stripped by gensim, which takes seconds, so the articles are kept in the cache. Rows are headings (`= Title =`) and
    paragraphs of at least 60 characters; an article ends at its first list section (References, See also, ...) and counts if
    1,000 characters remain.
    """
    try:
        kept = _cache_file().read_bytes()
    except OSError:
        kept = b""
    if hashlib.sha256(kept).hexdigest() != WIKI_A_SHA256:
        kept = json.dumps(_parsed(), ensure_ascii=False).encode()
        if hashlib.sha256(kept).hexdigest() == WIKI_A_SHA256:
            _keep(kept)
    return tuple((title, tuple(rows)) for title, rows in json.loads(kept))


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pared-down" / f"wiki-a-{WIKI_A_SHA256[:16]}.json"


def _keep(articles: bytes) -> None:
    """Write the cache in one piece. Without room or permission the text is parsed again the next time."""
    with contextlib.suppress(OSError):
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=_cache_file().parent, delete=False) as file:
            partial = Path(file.name)
            try:
                file.write(articles)
                file.close()
                partial.replace(_cache_file())
            finally:
                partial.unlink(missing_ok=True)


def _parsed() -> list[tuple[str, list[str]]]:
    """The articles out of gensim's dump. Raises FileNotFoundError without it, ValueError for another dump."""
    from gensim.corpora import wikicorpus
    from gensim.test.utils import datapath

    path = Path(datapath(WIKI_DUMP))
    if not path.is_file():
        raise FileNotFoundError(f"gensim is installed without its sample dump {WIKI_DUMP}: reinstall gensim from a wheel")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WIKI_DUMP_SHA256:
        raise ValueError(
            f"{WIKI_DUMP} has SHA-256 {digest}, expected {WIKI_DUMP_SHA256}: the corpus of the committed results "
            "differs from the installed one; reinstall gensim 4.4"
        )
    articles = []
    with bz2.open(path, "rb") as dump:
        for title, markup, _ in wikicorpus.extract_pages(dump, filter_namespaces=("0",)):
            rows = _article_rows(wikicorpus.filter_wiki(markup, promote_remaining=True, simplify_links=True))
            if sum(map(len, rows)) >= _SHORTEST_ARTICLE:
                articles.append((title, [f"= {title} =", *rows]))
    return articles


def wiki_a_split(position: int) -> str:
    """Split of the article at `position` in dump order: of every twelve, the sixth validates and the twelfth tests."""
    return {5: "validation", 11: "test"}.get(position % 12, "train")


def _article_rows(text: str) -> list[str]:
    rows: list[str] = []
    heading = None
    for line in text.splitlines():
        line = re.sub(r"'{2,}", "", line).strip().lstrip("*#:; ")
        line = re.sub(r"\s+", " ", line).strip()
        if match := re.fullmatch(r"(={2,6})\s*(.*?)\s*\1", line):
            heading = match.group(2)
            if heading.lower() in _LISTS_FROM_HERE:
                break
        elif len(line) >= _SHORTEST_PARAGRAPH:
            if heading:  # headings without prose below them are dropped
                rows.append(f"= {heading} =")
                heading = None
            rows.append(line)
    return rows
