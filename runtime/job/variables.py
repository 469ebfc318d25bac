"""Set the variables of [environment]. Their texts may refer to the variables that are there.

In: names and texts. Out: os.environ; perhaps a new start of Python, because it reads some variables only when it starts.

Outside of images, the job's script has expanded the texts before Python starts, and FTGEN_ENVIRONMENT says so. An image
has variables of its own, such as LD_LIBRARY_PATH, so there only this module can do it.
"""

import os
import re
import sys
from collections.abc import Mapping

from runtime.job.errors import JobError

MARK = "FTGEN_ENVIRONMENT"
READ_AT_THE_START = ("LD_", "PYTHON")  # beginnings of the names that the loader and Python read only once
REFERENCE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def set_variables(texts: Mapping[str, str]) -> None:
    """Set each variable, in this order; start Python again if that makes a difference to its start."""
    env, before = os.environ, dict(os.environ)
    for name, text in texts.items():
        if MARK not in before or "$" not in text:
            env[name] = expanded(name, text, env)
    env[MARK] = "set"
    changed = {name for name in texts if env[name] != before.get(name)}
    if MARK not in before and any(name.startswith(READ_AT_THE_START) for name in changed):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this program again


def expanded(name: str, text: str, environment: Mapping[str, str]) -> str:
    """The text with the values of $X and ${X}, and $$ as a dollar. Nothing in it is executed.

    An element of a list with colons that is empty only because its variables are not set is left out: in a search path,
    an empty element is the current folder.
    """

    def value(found: re.Match[str]) -> str:
        reference = found[1] or found[2]
        if reference and reference not in environment and reference != name and environment.get("SLURM_PROCID", "0") == "0":
            print(f"ftgen: warning: {name} refers to ${reference}, which is not set", file=sys.stderr, flush=True)
        return environment.get(reference, "") if reference else "$"

    elements = [(element, REFERENCE.sub(value, element)) for element in text.split(":")]
    return ":".join(after for element, after in elements if after or not element)


def path_with_values(key: str, path: str) -> str:
    """A path of the spec with the values of ~ and variables such as $HOME. JobError: a variable is not set."""

    def value(found: re.Match[str]) -> str:
        reference = found[1] or found[2]
        if not reference:
            return "$"
        if reference not in os.environ:
            raise JobError(f"{key}: {path} refers to ${reference}, which is not set", "export it, or write the whole path")
        return os.environ[reference]

    return REFERENCE.sub(value, f"$HOME{path[1:]}" if path == "~" or path.startswith("~/") else path)
