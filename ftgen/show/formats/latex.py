"""Tables in LaTeX. In: a `View`. Out: tabulars in plain ASCII, which need no package and any engine takes.

Names come from file names and logs, which anybody may have written. Every character that LaTeX reads as a command is
escaped, and control characters are spelled out.
"""

import re
from collections.abc import Sequence

from ftgen.results.keys import View
from ftgen.show.tables import REMARKS, remarks, tabulate
from ftgen.units import clean

ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",  # babel makes it active in some languages
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "–": r"\textendash{}",
    "[": "{[}",  # at the start of a row, [ and * would be options of the \\\\ before them
    "*": "{*}",
    "±": r"$\pm$",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}
HYPHENS = re.compile("-(?=-)")  # LaTeX makes a dash of two


def render(view: View) -> str:
    """The tabulars one after the other, and one of the remarks below them."""
    parts = [
        _table([cell.text for cell in table.header], [[cell.text for cell in row] for row in table.rows], table.notes)
        for table in tabulate(view)
    ]
    if told := remarks(view.runs):
        parts.append(_table(REMARKS, told, (), columns="llp{0.4\\linewidth}p{0.3\\linewidth}"))
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], *, columns: str = "") -> str:
    lines = [" & ".join(map(escaped, line)) + r" \\" for line in (header, *rows)]
    columns = columns or "l" + "r" * (len(header) - 1)
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    below = "".join(f"\\par\\noindent {escaped(note)}\n" for note in notes)
    return f"\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n{below}"


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is. A letter that is not ASCII becomes its code point: pdflatex may have no glyph."""
    plain = "".join(ESCAPES.get(char) or (char if char.isascii() else f"U+{ord(char):04X}") for char in clean(text))
    return HYPHENS.sub("-{}", plain)
