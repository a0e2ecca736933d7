"""A folded table is behind its title, whole, and readable where there is no HTML."""

import pandas as pd
import pytest

from lib.suite import tables

FRAME = pd.DataFrame({"method": ["a", "b"], "perplexity": [1.5, 2.25]})


@pytest.mark.parametrize("table", [FRAME, FRAME.style.format(precision=2)], ids=["frame", "style"])
def test_a_folded_table(table, monkeypatch):
    shown = []
    monkeypatch.setattr(tables, "display", shown.append)
    tables.fold(table, "A title < 5")
    html, text = shown[0]._repr_html_(), repr(shown[0])
    assert html.startswith("<details><summary>A title &lt; 5</summary>")
    assert html.endswith("</details>")
    assert all(value in html for value in ("perplexity", "1.5", "2.25"))
    assert text.splitlines()[0] == "A title < 5"
    assert "2.25" in text
