"""Reads the file that `data.chat_template` names. In: a `Source`. Out: its text, which the plan carries, and `Problem`s.

The script of a run needs no other file, so it has the text of the template, not its path.
"""

import re
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from ftgen.documents import get
from ftgen.errors import KeyPath, Problem
from ftgen.spec.source import COMMAND_LINE, Source

WHERE: KeyPath = ("data", "chat_template")
LARGEST = 1 << 16  # bytes; the templates of published models have at most 10,000
# A tag of transformers that Jinja does not know. Spaces keep the line numbers of a syntax error.
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def read_chat_template(source: Source) -> tuple[str | None, list[Problem]]:
    """The text of the template, or None if the spec names no file; and what is wrong with the file."""
    name, said = get(source.document, WHERE), source.said(WHERE)
    if not isinstance(name, str) or not name.isprintable() or not said:
        return None, []
    file = (Path() if said[0] == COMMAND_LINE else Path(said[0]).parent) / name
    try:
        content = file.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        what = f"must be a file with a chat template: {file}: {reason}"
        return None, [Problem(WHERE, what, "a relative path is relative to the file that names it")]
    if not text.strip() or len(content) > LARGEST:
        return None, [Problem(WHERE, f"must be a file of 1 to {LARGEST:,} bytes: {file} has {len(content):,}")]
    return text, _syntax_errors(text, file)


def _syntax_errors(text: str, file: Path) -> list[Problem]:
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(GENERATION.sub(" ", text))  # noqa: S701
    except TemplateSyntaxError as error:
        return [Problem((), f"is no Jinja template: {error.message}", file=str(file), line=error.lineno)]
    return []
