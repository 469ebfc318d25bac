"""Tables as marked-up text: Markdown, HTML, LaTeX. In: tables and remarks. Out: text.

Names come from file names and logs, which anybody may have written: each format escapes them in its own way, and
no control character gets through.
"""

import re
from collections.abc import Callable, Sequence

from ftgen.show.tables import Remark, Table
from ftgen.units import clean

REMARKS = ("Run", "Status", "Reason", "Log")

MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$#!]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is only that

LATEX = {
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
    "[": "{[}",  # at a row's beginning it would be an option of the \\\\ before it, as would *
    "*": "{*}",
    "±": r"$\pm$",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}
HYPHENS = re.compile("-(?=-)")  # two of them would become a dash


def markdown(tables: Sequence[Table], remarks: Sequence[Remark]) -> str:
    """The tables, and below them a table of what must be said of single runs."""
    parts = [_markdown_part(table) for table in tables]
    if remarks:
        parts.append(_markdown_table(REMARKS, remarks))
    return "\n".join(parts) or "No run.\n"


def _markdown_part(table: Table) -> str:
    text = _markdown_table([cell.text for cell in table.header], [[cell.text for cell in row] for row in table.rows])
    return text + "".join(f"\n{_markdown_cell(note)}\n" for note in table.notes)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell if line is lines[1] else _markdown_cell(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _markdown_cell(text: str) -> str:
    return MARKDOWN.sub(lambda match: "\\" + match.group(), clean(text))


def latex(tables: Sequence[Table], remarks: Sequence[Remark]) -> str:
    """Tabulars that need no package, one after the other; plain ASCII, so that any engine takes them."""
    parts = [_latex_table([c.text for c in t.header], [[c.text for c in row] for row in t.rows], t.notes) for t in tables]
    if remarks:
        parts.append(_latex_table(REMARKS, remarks, (), columns="llp{0.4\\linewidth}p{0.3\\linewidth}"))
    return "\n".join(parts)


def _latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], *, columns: str = "") -> str:
    lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (header, *rows)]
    columns = columns or "l" + "r" * (len(header) - 1)
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    below = "".join(f"\\par\\noindent {latex_text(note)}\n" for note in notes)
    return f"\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n{below}"


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is; a letter that pdflatex has no glyph for becomes its code point."""
    escaped = "".join(LATEX.get(char) or (char if char.isascii() else f"U+{ord(char):04X}") for char in clean(text))
    return HYPHENS.sub("-{}", escaped)


def html(tables: Sequence[Table], remarks: Sequence[Remark]) -> str:
    """One file with the tables, that needs no other."""
    from ftgen.show.pages import page  # Jinja takes its time

    return page("tables.html.j2", tables=tables, remarks=remarks)


MARKUPS: dict[str, Callable[[Sequence[Table], Sequence[Remark]], str]] = {
    "markdown": markdown,
    "html": html,
    "latex": latex,
}
