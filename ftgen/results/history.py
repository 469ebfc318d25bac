"""Keeps the records of runs in one SQLite file. In: `Record`s. Out: `Record`s, by time.

Several processes of one machine may write: SQLite locks the file. Where a file system cannot lock, the file is refused.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ftgen.errors import LogError, Problem
from ftgen.results.record import Record, key

NAME = "ftgen.sqlite"  # below STAGE_PATH
VERSION = 1  # of the tables, as the file's user_version
WAIT_S = 60.0  # for another writer
TABLE = "CREATE TABLE IF NOT EXISTS runs (key TEXT PRIMARY KEY, started TEXT, record TEXT NOT NULL)"
ELSEWHERE = "give a file on a local disk with --history; `ftgen history export` and `import` carry runs between files"


class Added(NamedTuple):
    """What became of the records that were added."""

    new: int
    changed: int  # runs that were there with another log: they went on since
    same: int


class History:
    """A file of runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, records: Iterable[Record]) -> Added:
        """Add runs. A run that is there is replaced if its log has changed."""
        counts = {"new": 0, "changed": 0, "same": 0}
        with self._open(create=True) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for record in records:
                row = connection.execute("SELECT record FROM runs WHERE key = ?", (key(record),)).fetchone()
                text = json.dumps(record, allow_nan=False, sort_keys=True)
                counts["new" if row is None else "same" if row[0] == text else "changed"] += 1
                connection.execute(
                    "INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", (key(record), record["results"]["started"], text)
                )
            connection.commit()
        return Added(**counts)

    def records(self) -> list[Record]:
        """All runs, the earliest first; runs without a time come first, by their ids."""
        with self._open(create=False) as connection:
            rows = connection.execute("SELECT record FROM runs").fetchall()
        return sorted((json.loads(text) for (text,) in rows), key=_by_time)

    @contextmanager
    def _open(self, *, create: bool) -> Iterator[sqlite3.Connection]:
        if not create and not self.path.is_file():
            raise self._problem(
                "there is no such history", "`ftgen history add LOGS` makes it, or give another with --history"
            )
        connection = None
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._can_lock()
            connection = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise self._problem(
                    f"was written by a later ftgen (format {version}, this one knows {VERSION})", "update ftgen"
                )
            connection.execute(TABLE)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            yield connection
        except sqlite3.OperationalError as error:
            raise self._problem(f"cannot be used: {error}", ELSEWHERE) from None
        except sqlite3.DatabaseError as error:
            raise self._problem(f"is no SQLite file of ftgen: {error}", "give another file with --history") from None
        except OSError as error:
            raise self._problem(f"cannot be written: {error.strerror}", ELSEWHERE) from None
        finally:
            if connection:
                connection.close()

    def _can_lock(self) -> None:
        """LogError if the file system cannot lock: SQLite would damage the file when two processes write."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 0)
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, 0)
        except BlockingIOError:
            pass  # somebody else has the lock, so there are locks
        except OSError as error:
            raise self._problem(f"is on a file system that cannot lock ({error.strerror})", ELSEWHERE) from None
        finally:
            os.close(descriptor)

    def _problem(self, what: str, hint: str) -> LogError:
        return LogError(Problem((), what, hint, file=str(self.path)))


def _by_time(record: Record) -> tuple[str, int, str]:
    results = record["results"]
    return results["started"] or "", len(results["run_id"]), results["run_id"]
