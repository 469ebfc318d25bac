"""Turn the errors of huggingface_hub into one line and a hint.

In: an exception of huggingface_hub, of whatever version, requests or httpx below it. Out: a `JobError`.

The text of such an exception can have a URL with a signature, or words of a server that repeats what it was sent. So no
text of an exception is passed on: only its type, the status, and the name of the host.

Environment: HF_ENDPOINT, HTTPS_PROXY and so on, for the texts.
"""

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from runtime.guard.publish import FULL
from runtime.hub import find
from runtime.hub.repository import Repository
from runtime.hub.token import has_token, token_file
from runtime.job.errors import JobError, causes

TOKENS = "https://huggingface.co/settings/tokens"
AGAIN = "try again: the download continues where it stopped"
# Words in the names of exceptions that requests, urllib3, httpx and the standard library raise if a connection fails.
NETWORK = ("Connect", "Timeout", "Proxy", "SSL", "Protocol", "Network", "Transport", "ChunkedEncoding", "gaierror")


class UnreachableError(JobError):
    """The hub cannot be reached from this machine."""


def command(script: str) -> str:
    """The command that downloads what the script's jobs need."""
    return f"where there is a network: bash {script}.sh --download"


@contextmanager
def plain_errors(repository: Repository, script: str) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a JobError. A full disk stays an OSError, for the guard."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes(error)):
            raise
        raise explain(error, repository, script) from error


def explain(error: Exception, repository: Repository, script: str) -> JobError:
    """What the exception means for the user."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    page = f"https://huggingface.co/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
    if isinstance(error, GatedRepoError):
        return _gated(repository, status, page)
    if isinstance(error, RevisionNotFoundError):
        return JobError(f"{repository.name} has no revision {repository.revision!r}", f"see {page}/tree/main")
    if isinstance(error, RepositoryNotFoundError):
        return _unknown(repository, status, page)
    if status:
        return _refused(repository, status)
    if any(word in kind.__name__ for cause in causes(error) for kind in type(cause).__mro__ for word in NETWORK):
        return UnreachableError(f"{repository} cannot be downloaded: {_reason(error)}", command(script))
    return JobError(f"{repository}: the download failed with {type(error).__name__}", AGAIN)


def offline(repository: Repository, script: str) -> JobError:
    """The error for a repository that is not on this machine, where a variable forbids the hub."""
    what = f"{find.offline_variable()} is set, and {repository} is not on this machine: {find.what_is_missing(repository)}"
    return JobError(what, command(script))


def no_token(repository: Repository, script: str) -> JobError:
    """The error for a gated repository without a token."""
    return JobError(
        f"{repository.name} is gated, and there is no Hugging Face token",
        f"run hf auth login, which writes {token_file()}, or export HF_TOKEN=<your token>; or {command(script)}",
    )


def _gated(repository: Repository, status: int | None, page: str) -> JobError:
    if status == 403:
        return JobError(
            f"{repository.name} is gated, and the account of this token has no access to it (403)",
            f"request access on {page} and wait until you have it; a fine-grained token also needs the permission to "
            "read gated repositories",
        )
    if has_token():
        return _bad_token(repository)
    return JobError(
        f"{repository.name} is gated, and there is no Hugging Face token (401)",
        f"request access on {page}, then run hf auth login or export HF_TOKEN=<your token>",
    )


def _unknown(repository: Repository, status: int | None, page: str) -> JobError:
    if status == 401 and not has_token():
        return JobError(
            f"{repository.name} is not public or does not exist, and there is no Hugging Face token (401)",
            f"look at {page}; if it is private, run hf auth login or export HF_TOKEN=<your token>",
        )
    return JobError(f"{repository.name} is not on the hub, or this token has no access to it ({status})", f"look at {page}")


def _bad_token(repository: Repository) -> JobError:
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else str(token_file())
    return JobError(
        f"{repository.name}: the hub does not accept the token of {where} (401)",
        f"create a token on {TOKENS}, then run hf auth login or export HF_TOKEN=<your token>",
    )


def _refused(repository: Repository, status: int) -> JobError:
    if status == 401:
        return _bad_token(repository)
    if status == 403:
        return JobError(f"{repository.name}: the hub refuses this token (403)", f"see its permissions on {TOKENS}")
    if status == 404:
        return JobError(f"{repository.name}: {_endpoint()} does not have it (404)", "correct HF_ENDPOINT")
    if status == 407:
        return JobError(
            f"{repository.name}: the proxy {_proxy(_endpoint())} wants a password (407)", "export it in HTTPS_PROXY"
        )
    if status == 429:
        return JobError(f"{repository.name}: too many requests to the hub (429)", f"wait some minutes, then {AGAIN}")
    return JobError(f"{repository.name}: the hub answers {status}", AGAIN)


def _reason(error: BaseException) -> str:
    """Which host does not answer, and why."""
    url, chain = _url(error), list(causes(error))
    host, proxy = _host(url), _proxy(url)
    refused = any(isinstance(cause, ConnectionRefusedError | socket.gaierror) for cause in chain)
    if any("Proxy" in type(cause).__name__ for cause in chain) or (proxy and refused):
        return f"the proxy {proxy} gives no way to {host}"
    if any(isinstance(cause, ssl.SSLError) or type(cause).__name__ == "SSLError" for cause in chain):
        return f"the certificate of {host} is not accepted; for a proxy's own, see SSL_CERT_FILE and REQUESTS_CA_BUNDLE"
    if any(isinstance(cause, socket.gaierror) for cause in chain):
        return f"the name {host} cannot be resolved"
    if refused:
        return f"{host} refuses the connection"
    through = f" through the proxy {proxy}" if proxy else ""
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in chain):
        return f"{host} does not answer{through}"
    return f"the connection to {host}{through} fails"


def _url(error: BaseException) -> str:
    """The address of the request that failed: of the hub, or where the hub redirects to for large files."""
    for cause in causes(error):
        try:
            return str(cause.request.url)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # httpx raises the latter if an exception has no request
            continue
    return _endpoint()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _proxy(url: str) -> str:
    """The proxy for an address, or an empty text."""
    proxies = getproxies()
    if proxy_bypass(urlsplit(url).hostname or ""):
        return ""
    return _host(proxies.get(urlsplit(url).scheme) or proxies.get("all") or "")


def _host(url: str) -> str:
    """Host and port, without the user and password that the address of a proxy can have."""
    return urlsplit(url).netloc.rpartition("@")[2]
