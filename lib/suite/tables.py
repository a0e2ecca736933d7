"""Tables that a page keeps at hand without standing in its way."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import pandas as pd
from IPython.display import display
from pandas.io.formats.style import Styler


@dataclass(frozen=True)
class Folded:
    """A table behind its title, which a click unfolds; where there is no HTML, the title and the table below it."""

    table: pd.DataFrame | Styler
    title: str

    def _repr_html_(self) -> str:
        return f"<details><summary>{escape(self.title)}</summary>{self.table._repr_html_()}</details>"

    def __repr__(self) -> str:
        return f"{self.title}\n{getattr(self.table, 'data', self.table)}"


def fold(table: pd.DataFrame | Styler, title: str) -> None:
    """Show a table behind its title: one that backs up what is said beside it. A page has at most five open ones."""
    display(Folded(table, title))
