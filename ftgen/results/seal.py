"""Seals a run: puts all that its figures stand on into one zip. In: a `Run` and its `Log`. Out: a file.

What is private is removed from every text first. The results are those of the texts without it, so everybody who has the
file can compute them again. The same run gives the same bytes.
"""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftgen import __version__
from ftgen.errors import LogError, Problem
from ftgen.logs.blocks import LogFileError, blocks
from ftgen.logs.find import Run, find_runs
from ftgen.logs.log import Log
from ftgen.logs.read import logs_of, read_log
from ftgen.results.compare import FORMAT
from ftgen.results.keys import row
from ftgen.results.private import Remove, remover, secrets_of
from ftgen.results.record import hash_of
from ftgen.results.rules import rules
from ftgen.results.sealed import (
    CHUNK,
    ENVIRONMENT,
    LARGEST,
    MANIFEST,
    RESULTS,
    RUN,
    SIGNATURE,
    SPEC,
    Manifest,
    Rules,
    Sealed,
    SealedFile,
    SealedRun,
)
from ftgen.results.signature import sign
from ftgen.results.summary import judge

LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip knows, for all of its files
A_FILE = 0o100644 << 16


def find_one(path: Path, run_id: str | None = None) -> tuple[Run, Log]:
    """The run in a folder or a log, by its id if there are several. LogError: none, or several."""
    found = [each for run in find_runs([path]) for each in logs_of(run, read_log(run))]
    chosen = [(run, log) for run, log in found if run_id in {None, run.run_id}]
    if len(chosen) == 1:
        return chosen[0]
    ids = ", ".join(dict.fromkeys(run.run_id or run.log for run, _ in found))
    if not chosen:
        raise LogError(Problem((), f"has no run {run_id}", f"it has {ids}", file=str(path)))
    hint = f"name one with --run: {ids}" if run_id is None else "give the folder of one of them"
    raise LogError(Problem((), f"has {len(chosen)} runs, one is needed", hint, file=str(path)))


def seal(run: Run, log: Log, output: Path, *, spec: str | None, key: Path | None = None) -> Sealed:
    """Write a run to a zip; `spec` does it again. `key`: an SSH key that signs. LogError: a log that cannot be read."""
    with tempfile.TemporaryDirectory(prefix="ftgen-seal-") as temporary:
        folder = Path(temporary)
        names = _copy(run, folder, remover())
        if log.environment and not (folder / ENVIRONMENT).is_file():  # a run before ftgen wrote that file
            (folder / ENVIRONMENT).write_bytes(remover()(json.dumps(log.environment, indent=1, sort_keys=True).encode()))
        sealed = Sealed(output, folder, _manifest(run, names, log), is_signed=key is not None)
        _write_json(folder / RESULTS, {"format": FORMAT, "baseline": None, "runs": [_results(sealed)], "groups": []})
        if spec is not None:
            (folder / SPEC).write_bytes(remover()(spec.encode()))
        files = {name: SealedFile(**_described(folder / name)) for name in _names(folder)}
        _nothing_private(folder, files)
        sealed = sealed._replace(manifest=sealed.manifest.model_copy(update={"files": files}))
        _write_json(folder / MANIFEST, sealed.manifest.model_dump())
        if key:
            sign(folder / MANIFEST, key)
        _zip(folder, output)
    return sealed


def _copy(run: Run, folder: Path, remove: Remove) -> dict[str, str]:
    """Copy the run's files without what is private. Their names in the zip, by their paths."""
    names: dict[str, str] = {}
    for log in (run.log, *run.earlier, *map(str, run.beside)):
        names[log] = RUN + Path(log).name.removesuffix(".gz").removesuffix(".zst")
        _copy_log(log, folder / names[log], remove)
    home = Path(run.log).parent
    if run.plan:  # it says that the folder is this run's and no other's
        others = [run.plan, home / "environment.json", *sorted((home / "nodes").glob("*.json"))]
        others += sorted(path for path in home.glob("telemetry*") if path.is_file())
        for path in filter(Path.is_file, others):
            _copy_log(str(path), folder / RUN / path.relative_to(home), remove)
    return names


def _copy_log(path: str, target: Path, remove: Remove) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    try:
        with target.open("xb") as copy:
            for raw in blocks(path):
                size += copy.write(remove(raw))
                if size > LARGEST:
                    raise LogError(Problem((), f"has more than {LARGEST} bytes, too many for a sealed run", file=path))
    except LogFileError as error:
        raise LogError(Problem((), f"cannot be sealed: {error}", file=path)) from None
    except FileExistsError:
        what = f"cannot be sealed: two files of the run have the name {target.name}"
        raise LogError(Problem((), what, file=path)) from None


def _manifest(run: Run, names: dict[str, str], log: Log) -> Manifest:
    of = SealedRun(
        experiment=remover()(f"/{run.experiment}".encode()).decode().lstrip("~/"),  # it may be a path
        run_id=run.run_id,
        log=names[run.log],
        restart=run.restart,
        earlier=[names[path] for path in run.earlier],
        beside=[names[str(path)] for path in run.beside],
        log_sha256=hash_of(run.log),
    )
    script = (log.environment or {}).get("script_sha256")
    made_by = Rules(ftgen=__version__, sha256=rules())
    return Manifest(format=1, run=of, rules=made_by, script_sha256=script if isinstance(script, str) else None, files={})


def _results(sealed: Sealed) -> dict[str, Any]:
    return results_of(*sealed.read(), sealed.manifest.run.log)


def results_of(run: Run, log: Log, name: str) -> dict[str, Any]:
    """The results of a sealed run, with its log by its name in the zip."""
    return {**row(judge(run, log)), "log": name}


def _described(path: Path) -> dict[str, Any]:
    return {"sha256": hash_of(str(path)), "bytes": path.stat().st_size}


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _nothing_private(folder: Path, names: Iterable[str]) -> None:
    """LogError if a secret of this shell is in a file after all."""
    secrets = secrets_of(os.environ)
    for name in names:
        found = any(secret in text for text in _chunks(folder / name) for secret in secrets)
        if found:
            raise LogError(Problem((), f"{name} still has a secret of this shell: nothing is sealed"))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(CHUNK), b"")


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _zip(folder: Path, output: Path) -> None:
    """Completely or not at all: the manifest first, then all files by name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            first = [name for name in (MANIFEST, SIGNATURE) if (folder / name).is_file()]
            for name in [*first, *(name for name in _names(folder) if name not in first)]:
                entry = zipfile.ZipInfo(name, LONG_AGO)
                entry.external_attr, entry.create_system, entry.compress_type = A_FILE, 3, zipfile.ZIP_DEFLATED
                entry.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(entry, "w") as copy:
                    shutil.copyfileobj(source, copy, CHUNK)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
