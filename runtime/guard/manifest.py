"""Write and check the manifest of a published directory.

In: a directory and the source that it must have. Out: manifest.json in the directory, or the first flaw as text.

manifest.json contains {"format", "source", "origin", "files": {path: {"size": bytes, "mtime": seconds, "sha256":
hex}}}. `source` is what the plan asked for, and is compared. `origin` is what the build found (a commit, versions),
and is not compared.

Size and hash of every file must be those of the manifest. A large file is hashed only if its modification time has
changed, as it does when a directory is copied; times are compared in whole seconds, because some file systems store
no more. `thorough` hashes every file. Files that the manifest does not name are ignored, because frameworks write
caches beside their data.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"
SMALL = 1 << 20  # bytes; on a shared file system, reading a smaller file takes about as long as asking for its size

Source = dict[str, Any]


def write(directory: Path, source: Source, origin: Source) -> None:
    """Write the manifest of a finished directory, and sync all its files to the disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        entries = list(pool.map(_entry, paths))
    files = {path.relative_to(directory).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    text = json.dumps({"format": FORMAT, "source": source, "origin": origin, "files": files}, indent=1, sort_keys=True)
    partial = directory / f".{NAME}"
    partial.write_text(text + "\n")
    sync(partial)
    partial.rename(directory / NAME)
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync(folder)


def flaw(directory: Path, source: Source, *, thorough: bool = False) -> str | None:
    """The first thing that is wrong with a published directory, or None. Never raises, whatever the directory contains."""
    try:
        document = json.loads((directory / NAME).read_text())
        if document["format"] != FORMAT or not document["files"]:
            return f"{NAME} has another format"
        if difference := _difference(document["source"], json.loads(json.dumps(source))):
            return difference
        with ThreadPoolExecutor(4) as pool:
            flaws = pool.map(lambda item: _file_flaw(directory / item[0], item[1], thorough), document["files"].items())
        return next((found for found in flaws if found), None)
    except FileNotFoundError:
        return f"it has no {NAME}" if directory.exists() else "it does not exist"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read: {error}"


def sync(path: Path) -> None:
    """Wait until a file's content or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    sync(path)
    digest, status = sha256_of(path), path.stat()
    return {"size": status.st_size, "mtime": int(status.st_mtime), "sha256": digest}


def _difference(found: Source, wanted: Source) -> str | None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            return f"it was built with {key} = {found.get(key)!r}, not {wanted.get(key)!r}"
    return None


def _file_flaw(path: Path, entry: dict[str, Any], thorough: bool) -> str | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"{path.name} is missing"
    if status.st_size != entry["size"]:
        return f"{path.name} has {status.st_size} bytes, not {entry['size']}"
    unchanged = status.st_size > SMALL and int(status.st_mtime) == entry["mtime"]
    if (thorough or not unchanged) and sha256_of(path) != entry["sha256"]:
        return f"{path.name} has changed since it was built"
    return None
