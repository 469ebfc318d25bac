"""A Hugging Face hub with one dataset, on this machine: what `datasets` asks of a hub, and nothing else."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

NAME = "ftgen/facts"
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers for the files of `folder`."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        type(self).asked.append(path)
        if path.startswith(f"/datasets/{NAME}/resolve/{COMMIT}/"):
            self._file(path.partition(f"{COMMIT}/")[2])
        elif path.startswith((f"/api/datasets/{NAME}/revision/{COMMIT}", f"/api/datasets/{NAME}/tree/{COMMIT}")):
            self._json(self._tree() if "/tree/" in path else self._info())
        else:
            missing = "RevisionNotFound" if f"/{NAME}/" in path else "RepoNotFound"
            self._json({"error": "not found"}, 404, {"X-Error-Code": missing})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        type(self).asked.append(self.path)
        self._json([one for one in self._tree() if one["path"] in body])

    def _tree(self) -> list[dict[str, object]]:
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return [
            {"type": "file", "path": str(path.relative_to(self.folder)), "size": path.stat().st_size, "oid": _oid(path)}
            for path in files
        ]

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": one["path"]} for one in self._tree()]
        return {"_id": "1", "id": NAME, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def _file(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(path.read_bytes(), 200, {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT})

    def _json(self, document: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _oid(path: Path) -> str:
    return sha1(path.read_bytes()).hexdigest()  # noqa: S324


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The hub's address, and the paths that it was asked for."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"folder": folder, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
