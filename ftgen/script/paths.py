"""Expands `~` and variables in the paths of a site profile, on the node where a job runs, or here.

In: a path as the user writes it (`str`). Out: one word of bash, or the path (`str`). Nothing in a path is executed.

Only names in capital letters are variables: those in small letters are the script's own.
"""

import re
import shlex
from collections.abc import Mapping

VARIABLE = re.compile(r"\$(?:\{([A-Z][A-Z0-9_]*)\}|([A-Z][A-Z0-9_]*)(?![A-Za-z0-9_]))")


def path_in_bash(path: str) -> str:
    """One word of bash. A variable that is not set ends the job with its name."""
    if path == "~" or path.startswith("~/"):
        path = f"$HOME{path[1:]}"
    if not VARIABLE.search(path):
        return shlex.quote(path)
    parts = VARIABLE.split(path)  # text, name in braces or None, plain name or None, text, ...
    word = _literal(parts[0])
    for braced, plain, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        name = braced or plain
        word += "${STAGE_PATH}" if name == "STAGE_PATH" else f"${{{name}:?is not set, but the site profile uses it}}"
        word += _literal(text)
    return f'"{word}"'


def path_here(path: str, environment: Mapping[str, str]) -> str:
    """The path with the variables of an environment. An unset variable stays as it is written."""
    if path == "~" or path.startswith("~/"):
        path = f"$HOME{path[1:]}"
    return VARIABLE.sub(lambda found: environment.get(found[1] or found[2], found[0]), path)


def _literal(text: str) -> str:
    """The text inside double quotes of bash."""
    return re.sub(r'([\\"$`])', r"\\\1", text)
