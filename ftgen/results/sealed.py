"""A sealed run: one zip with a run's logs, plan, environment and results, and a manifest of their hashes.

In: the path of such a file, which may come from anybody. Out: a `Sealed` run, extracted to a folder, or a LogError that says
what is wrong with the file. Nothing is extracted that the manifest does not list with its size and its hash.
"""

import hashlib
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ftgen.errors import LogError, Problem
from ftgen.logs.find import TELEMETRY, Run
from ftgen.logs.log import Log
from ftgen.logs.read import logs_of, read_log
from ftgen.results.baseline import Results
from ftgen.validation import validate

MANIFEST, SIGNATURE, RESULTS, SPEC = "manifest.json", "manifest.json.sig", "results.json", "spec.toml"
RUN = "run/"  # before the names of the run's own files
PLAN, ENVIRONMENT, NODES = (RUN + name for name in ("plan.json", "environment.json", "nodes/"))
LARGEST = 4 << 30  # bytes of all files of a sealed run
LARGEST_JSON = 16 << 20  # bytes of the manifest
MOST_FILES = 10_000
MOST_PACKED = 400  # times that a file may become larger; deflate reaches 1,032, logs of training stay below 100
UNJUDGED = 1 << 20  # bytes up to which a file may be packed as well as it can be
CHUNK = 1 << 20
NAME = re.compile(r"(?!.*(?:^|/)\.{1,2}(?:/|$))[^/\\\x00-\x1f\x7f:][^\\\x00-\x1f\x7f:]*(?<!/)")
MADE_BY = "a sealed run is made by `ftgen seal RUN -o FILE`"
Read = TypeVar("Read", bound=BaseModel)


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class SealedFile(_Table):
    """A file, as the manifest has it."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=LARGEST)


class SealedRun(_Table):
    """Which run it is, and which of the files are its logs."""

    experiment: str
    run_id: str
    log: str
    restart: int
    earlier: list[str]
    beside: list[str]
    log_sha256: str  # of the log before anything was removed from it, as a history has it


class Rules(_Table):
    """What made the results."""

    ftgen: str
    sha256: str


class Manifest(_Table):
    """What a sealed run has in it."""

    format: Literal[1]
    run: SealedRun
    rules: Rules
    script_sha256: str | None
    files: dict[str, SealedFile]


class Sealed(NamedTuple):
    """A sealed run whose files are as the manifest says."""

    path: Path
    folder: Path  # where its files are now
    manifest: Manifest
    is_signed: bool

    def read_json(self, name: str) -> Any:
        """What a file says; None if there is no such file. LogError if it is no JSON."""
        if name not in self.manifest.files:
            return None
        return _json((self.folder / name).read_bytes(), self.path, name)

    def results(self) -> dict[str, Any]:
        """The results as they were sealed; LogError if they are none."""
        document = self.read_json(RESULTS)
        found, problems = validate(Results, document) if isinstance(document, dict) else (None, [])
        if not found or len(found.runs) != 1:
            raise _problem(self.path, f"{RESULTS} has no results of one run", *(str(each) for each in problems[:1]))
        results: dict[str, Any] = document["runs"][0]
        return results

    def read(self) -> tuple[Run, Log]:
        """The run and its log, read again from the logs inside."""
        of = self.manifest.run
        plan = self.folder / PLAN
        earlier = tuple(str(self.folder / name) for name in of.earlier)
        beside = tuple(self.folder / name for name in of.beside)
        run_id, _, number = of.run_id.partition("#")
        log = str(self.folder / of.log)
        samples = sorted((self.folder / RUN).glob("telemetry*"))
        telemetry = tuple(path for path in samples if TELEMETRY.fullmatch(path.name))
        run = Run(of.experiment, run_id, log, of.restart, earlier, plan if plan.is_file() else None, beside, 0, telemetry)
        found = logs_of(run, read_log(run))
        if number and int(number) > len(found):
            raise _problem(self.path, f"the log has {len(found)} runs, but this is run {number} of it")
        return found[int(number) - 1 if number else 0]


def is_sealed(path: Path) -> bool:
    """Whether a file looks like a zip."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def open_sealed(path: Path, folder: Path) -> Sealed:
    """Check a sealed run and extract its files to an empty folder. LogError: what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, path)
            manifest = _manifest(archive, entries, path)
            _all_listed(entries, manifest, path)
            for name, file in manifest.files.items():
                _extract(archive, entries[name], file, folder / name, path)
            if SIGNATURE in entries:
                (folder / SIGNATURE).write_bytes(_read(archive, entries[SIGNATURE], LARGEST_JSON, path))
            (folder / MANIFEST).write_bytes(_read(archive, entries[MANIFEST], LARGEST_JSON, path))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _problem(path, f"is no zip that can be read: {error}") from None
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror or error}") from None
    return Sealed(path, folder, manifest, SIGNATURE in entries)


def _entries(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files of the zip by their names; LogError for what no sealed run has."""
    found = archive.infolist()
    if len(found) > MOST_FILES:
        raise _problem(path, f"has {len(found)} files, at most {MOST_FILES} are possible")
    total = 0
    for entry in found:
        name = entry.filename
        if not NAME.fullmatch(name):
            raise _problem(path, f"has a file with the name {json.dumps(name)}, which leads out of a folder or is none")
        if entry.flag_bits & 1:
            raise _problem(path, f"{name} is encrypted")
        if entry.external_attr >> 16 & 0o170000 not in {0, 0o100000}:
            raise _problem(path, f"{name} is a link or another thing that is no file")
        if entry.file_size > max(UNJUDGED, MOST_PACKED * entry.compress_size):
            sizes = f"{entry.file_size} bytes from {entry.compress_size}"
            raise _problem(path, f"{name} would become {sizes}, which no log does")
        total += entry.file_size
    if total > LARGEST:
        raise _problem(path, f"its files have {total} bytes together, at most {LARGEST} are possible")
    if len({entry.filename for entry in found}) < len(found):
        raise _problem(path, "has two files of one name")
    return {entry.filename: entry for entry in found}


def _manifest(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], path: Path) -> Manifest:
    if MANIFEST not in entries:
        raise _problem(path, f"has no {MANIFEST}")
    document = _json(_read(archive, entries[MANIFEST], LARGEST_JSON, path), path, MANIFEST)
    if not isinstance(document, dict) or document.get("format") != 1:
        raise _problem(path, f"{MANIFEST} is none of a format that this ftgen knows")
    manifest, problems = validate(Manifest, document)
    if manifest is None:
        raise LogError(*(each._replace(file=f"{path}/{MANIFEST}") for each in problems))
    return manifest


def _all_listed(entries: dict[str, zipfile.ZipInfo], manifest: Manifest, path: Path) -> None:
    """LogError unless the zip has the files of the manifest and no others."""
    here = entries.keys() - {MANIFEST, SIGNATURE}
    if missing := sorted(manifest.files.keys() - here):
        raise _problem(path, f"{missing[0]} is missing, which the manifest lists")
    if more := sorted(here - manifest.files.keys()):
        raise _problem(path, f"has {more[0]}, which the manifest does not list")
    run = manifest.run
    if lacking := [name for name in (run.log, *run.earlier, *run.beside, RESULTS) if name not in manifest.files]:
        raise _problem(path, f"the manifest lists no {lacking[0]}")


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: SealedFile, target: Path, path: Path) -> None:
    """Write one file; LogError if it is not the one that was sealed."""
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("xb") as copy:
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if size > file.bytes:
                break
            digest.update(chunk)
            copy.write(chunk)
    if size != file.bytes or digest.hexdigest() != file.sha256:
        raise _problem(path, f"{entry.filename} is not the file that was sealed: its hash or its size differs")


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int, path: Path) -> bytes:
    with archive.open(entry) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise _problem(path, f"{entry.filename} is longer than {most} bytes")
    return text


def _json(text: bytes, path: Path, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _problem(path, f"{name} is no JSON: {error}") from None


def _problem(path: Path, *what: str) -> LogError:
    return LogError(Problem((), ": ".join(what), MADE_BY, file=str(path)))
