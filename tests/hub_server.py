"""A Hugging Face hub on 127.0.0.1 that has what a test gives it, and a proxy. Both record what they are asked.

The answers are those that huggingface_hub's own code expects: /api/{models,datasets}/NAME/revision/REVISION lists the
files, NAME/resolve/COMMIT/FILE has a small file, or redirects to another host with a signed address for a large one.
A gated repository can be listed by all; its files give 401 without a token and 403 with one that has no access.
"""

import hashlib
import http.client
import json
import select
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 14


class Asked(NamedTuple):
    """A request as the server got it."""

    method: str
    path: str
    token: str
    range: str
    host: str


class Server:
    """A server in a thread. `asked` is what it was asked."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.asked: list[Asked] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                asked = Asked(self.command, self.path, token, self.headers.get("Range", ""), self.headers.get("Host", ""))
                outer.asked.append(asked)
                outer.answer(self, asked)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_CONNECT(self) -> None:
                outer.asked.append(Asked("CONNECT", self.path, self.headers.get("Authorization", ""), "", ""))
                tunnel(self)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that was killed is no error of the server."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.scheme = "https" if certificate else "http"
        self.url = f"{self.scheme}://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, asked: Asked) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def tunnel(handler: BaseHTTPRequestHandler) -> None:
    """Pass bytes both ways until one side ends, as a proxy does for https."""
    host, _, port = handler.path.partition(":")
    with socket.create_connection((host, int(port))) as there:
        handler.send_response(200)
        handler.end_headers()
        here = handler.connection
        while ready := select.select([here, there], [], [], 30)[0]:
            for side in ready:
                data = side.recv(CHUNK)
                if not data:
                    handler.close_connection = True
                    return
                (there if side is here else here).sendall(data)


class Hub(Server):
    """The hub. Its attributes say what it has and how it misbehaves."""

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(certificate)
        self.files: dict[str, dict[str, bytes]] = {}  # by "models/org/name" or "datasets/org/name"
        self.gated: set[str] = set()
        self.tokens: dict[str, set[str]] = {}  # the gated repositories that each token may read
        self.status: dict[str, int] = {}  # an answer by the last part of the path
        self.silent = False  # it takes a request and never answers
        self.bare = False  # it lists names only, as some mirrors do
        self.damaged: set[str] = set()  # files that arrive with another byte
        self.cut: dict[str, int] = {}  # files whose connection ends after so many bytes, each time
        self.bytes_per_s = 0.0  # of a large file; 0: no limit

    def sent(self, name: str) -> list[str]:
        """The ranges in which the bytes of a file were asked for, an empty text for all of them."""
        digest = hashlib.sha256(next(files[name] for files in self.files.values() if name in files)).hexdigest()
        return [asked.range for asked in self.asked if asked.path.startswith(f"/cdn/{digest}") and asked.method == "GET"]

    def answer(self, handler: BaseHTTPRequestHandler, asked: Asked) -> None:
        path = urlsplit(asked.path).path.strip("/")
        if self.silent:
            time.sleep(60)
        elif (status := self.status.get(path.rpartition("/")[2])) is not None:
            # a server can repeat what it was sent: this must not get into a log
            send(handler, status, f"your token is {asked.token}".encode(), {"X-Error-Message": f"not for {asked.token}"})
        elif path.startswith("cdn/"):
            self.send_large(handler, path.split("/")[1], asked.range)
        elif path.startswith("api/"):
            self.list(handler, asked, path.removeprefix("api/"))
        else:
            self.send_file(handler, asked, path if path.startswith("datasets/") else f"models/{path}")

    def refused(self, handler: BaseHTTPRequestHandler, asked: Asked, key: str, *, listing: bool) -> bool:
        if asked.token and asked.token not in self.tokens:
            send(handler, 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif key not in self.files:
            send(handler, 404 if asked.token else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif key in self.gated and not listing and key not in self.tokens.get(asked.token, set()):
            send(handler, 403 if asked.token else 401, headers={"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def list(self, handler: BaseHTTPRequestHandler, asked: Asked, path: str) -> None:
        key, _, revision = path.partition("/revision/")
        if self.refused(handler, asked, key, listing=True):
            return
        if revision not in {"main", "", COMMIT}:
            send(handler, 404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [self.sibling(name, content) for name, content in self.files[key].items()]
        about = {"private": False, "tags": [], "downloads": 0, "likes": 0}  # old versions of huggingface_hub insist on these
        document = {"id": key.partition("/")[2], "sha": COMMIT, "siblings": siblings, **about}
        send(handler, 200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        if self.bare:
            return {"rfilename": name}
        about = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
        digest = hashlib.sha256(content).hexdigest()
        return about | ({"lfs": {"size": len(content), "sha256": digest, "pointerSize": 134}} if is_large(name) else {})

    def send_file(self, handler: BaseHTTPRequestHandler, asked: Asked, path: str) -> None:
        key, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if self.refused(handler, asked, key, listing=False):
            return
        content = self.files[key].get(name)
        if content is None or revision not in {"main", COMMIT}:
            send(handler, 404, headers={"X-Error-Code": "EntryNotFound"})
            return
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_sha1(content)}"', "Accept-Ranges": "bytes"}
        if is_large(name):
            digest, host = hashlib.sha256(content).hexdigest(), f"{self.scheme}://localhost:{self.server.server_port}"
            large = {"Location": f"{host}/cdn/{digest}?Signature=a-secret", "X-Linked-Etag": f'"{digest}"'}
            send(handler, 302, headers=about | large | {"X-Linked-Size": str(len(content))})
            return
        send(handler, 200, flipped(content) if name in self.damaged else content, about)

    def send_large(self, handler: BaseHTTPRequestHandler, digest: str, asked_range: str) -> None:
        every = {name: content for files in self.files.values() for name, content in files.items()}
        name, content = next((n, c) for n, c in every.items() if hashlib.sha256(c).hexdigest() == digest)
        first = int(asked_range.removeprefix("bytes=").partition("-")[0]) if asked_range else 0
        body = (flipped(content) if name in self.damaged else content)[first:]
        handler.send_response(206 if asked_range else 200)
        handler.send_header("Content-Length", str(len(body)))
        if asked_range:
            handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        for start in range(0, len(body) if handler.command == "GET" else 0, CHUNK):
            if name in self.cut and start >= self.cut[name]:
                handler.close_connection = True
                return
            handler.wfile.write(body[start : start + CHUNK])
            if self.bytes_per_s:
                time.sleep(CHUNK / self.bytes_per_s)


class Proxy(Server):
    """A proxy for http:// and https:// addresses. With `password`, it wants one for http://."""

    def __init__(self, password: str = "") -> None:
        super().__init__()
        self.password = password

    def answer(self, handler: BaseHTTPRequestHandler, asked: Asked) -> None:
        if self.password and not handler.headers.get("Proxy-Authorization"):
            send(handler, 407, headers={"Proxy-Authenticate": "Basic"})
            return
        url = urlsplit(asked.path)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        headers = {name: value for name, value in handler.headers.items() if not name.lower().startswith("proxy-")}
        connection.request(asked.method, f"{url.path}?{url.query}", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        kept = {
            name: value for name, value in answer.getheaders() if name.lower() not in {"content-length", "server", "date"}
        }
        send(handler, answer.status, body, kept)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet"))


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]
