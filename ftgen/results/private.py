"""Removes what must not leave this machine: secrets, and the paths of home directories.

In: text (`bytes`), and what this machine knows of its user. Out: the text with `[removed]` for secrets and `~` for homes.
"""

import os
import pwd
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ftgen.files import exists
from ftgen.secret import REMOVED, is_secret, without_secrets

SHORTEST = 6  # characters of a secret's value, or of a home's path, that is looked for as it stands
# /home/alice, /lustre/home/alice, /Users/alice, and root's
HOMES = re.compile(rb"(?:/[\w.@+-]+)*/(?:home|Users|users)/[\w.@+-]+|(?<![\w./~-])/root(?![\w.-])")
HUB_TOKENS = ("HF_TOKEN_PATH", "~/.cache/huggingface/token", "~/.huggingface/token")
PASSWORD = re.compile(rb"\bpassword\s+(\S+)")  # in ~/.netrc, where wandb keeps its key

Remove = Callable[[bytes], bytes]


def remover(environ: Mapping[str, str] | None = None) -> Remove:
    """The function that removes what is private, also the secrets and the home of this shell's user."""
    environ = os.environ if environ is None else environ
    secrets, homes = _pattern(secrets_of(environ)), _pattern(_homes(environ), path=True)
    user = _user_in_path(environ)

    def remove(text: bytes) -> bytes:
        text = secrets.sub(REMOVED, text) if secrets else text
        text = homes.sub(b"~", text) if homes else text
        text = HOMES.sub(b"~", text)
        text = user.sub(b"/user", text) if user else text
        return without_secrets(text)

    return remove


def secrets_of(environ: Mapping[str, str]) -> set[bytes]:
    """The secrets that this shell has: in variables, in the token files of the hub, in ~/.netrc."""
    values = {value.encode(errors="surrogateescape") for name, value in environ.items() if is_secret(name)}
    for file in (environ.get(HUB_TOKENS[0]), *HUB_TOKENS[1:]):
        values.add(_read(file, environ).strip())
    values |= set(PASSWORD.findall(_read("~/.netrc", environ)))
    return {value for value in values if len(value) >= SHORTEST and not exists(Path(os.fsdecode(value)))}


def _homes(environ: Mapping[str, str]) -> set[bytes]:
    found = {environ.get("HOME", ""), os.path.realpath(environ.get("HOME", "/"))}
    return {home.rstrip("/").encode(errors="surrogateescape") for home in found if len(home.rstrip("/")) >= SHORTEST}


def _user_in_path(environ: Mapping[str, str]) -> re.Pattern[bytes] | None:
    """The user's name as a part of a path: /scratch/alice. None for root and for names that are parts of other paths."""
    try:
        name = environ.get("USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user of a container without an entry
        return None
    return re.compile(rb"/" + re.escape(name.encode()) + rb"(?![\w.-])") if len(name) > 3 and name != "root" else None


def _pattern(values: Iterable[bytes], *, path: bool = False) -> re.Pattern[bytes] | None:
    longest_first = sorted(values, key=lambda value: (-len(value), value))
    end = rb"(?![\w.-])" if path else b""
    return re.compile(rb"(?:" + b"|".join(map(re.escape, longest_first)) + rb")" + end) if longest_first else None


def _read(file: str | None, environ: Mapping[str, str]) -> bytes:
    """A small file of the user's; nothing if there is none, or it is not ours to read."""
    if not file:
        return b""
    path = Path(environ.get("HOME", "/"), file[2:]) if file.startswith("~/") else Path(file)
    try:
        return path.read_bytes()[:65536]
    except OSError:
        return b""
