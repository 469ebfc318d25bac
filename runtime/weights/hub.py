"""Download a model from the Hugging Face hub.

In: a repository and a revision. Out: a directory, or a JobError.

huggingface_hub finds the token itself (HF_TOKEN, or the file HF_TOKEN_PATH). This module never passes it on or prints it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.weights import base, shards

# The files that the importer reads, or an export needs. Many repositories also have the weights in Meta's own format
# ("original/", *.pth).
PATTERNS = [*base.SMALL, "*.safetensors*"]
OUTSIDE = ["*/*"]  # PATTERNS also match files in sub-folders


class UnreachableError(JobError):
    """The hub cannot be reached from this machine."""


def download(repository: str, revision: str | None) -> Path:
    """Folder of the revision's newest commit in the cache of $HF_HOME. An interrupted download continues."""
    from huggingface_hub import snapshot_download

    with _plain_errors(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=PATTERNS, ignore_patterns=OUTSIDE))


def cached(repository: str, revision: str | None) -> Path | None:
    """Folder of a revision in the cache, if its weights are there too. Uses no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        return folder if all((folder / file).is_file() for file in shards.files_of(folder)) else None
    except LocalEntryNotFoundError:
        return None


def bytes_to_download(repository: str, revision: str | None) -> int:
    """Bytes that `download` would still have to download."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    try:
        with _plain_errors(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except UnreachableError:
        return 0  # the cache may have everything; if it does not, `download` raises this error again
    wanted = filter_repo_objects(
        info.siblings or [], allow_patterns=PATTERNS, ignore_patterns=OUTSIDE, key=lambda file: str(file.rfilename)
    )
    missing = [
        file for file in wanted if not isinstance(try_to_load_from_cache(repository, file.rfilename, revision=info.sha), str)
    ]
    return sum(file.size or 0 for file in missing)


def has_token() -> bool:
    """Whether there is a token, in the environment or in a file."""
    from huggingface_hub import get_token

    return bool(get_token())


@contextmanager
def _plain_errors(repository: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise JobError(
            f"{repository} is gated, and this token has no access to it" if has_token() else f"{repository} is gated",
            f"ask for access on {page}" + ("" if has_token() else ", then export HF_TOKEN=<your token>"),
        ) from error
    except errors.RevisionNotFoundError as error:
        raise JobError(f"{repository} has no revision {revision!r}", f"see {page}/tree/main") from error
    except errors.RepositoryNotFoundError as error:
        raise JobError(
            f"{repository} is not on the Hugging Face hub, or this token has no access to it",
            f"look at {page}; if it is private, export HF_TOKEN=<your token>",
        ) from error
    except Exception as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError)
        if offline or any(word in type(error).__name__ for word in ("Connect", "Timeout")):
            raise UnreachableError(
                f"{repository} is not in the cache, and the Hugging Face hub cannot be reached from this machine",
                'convert on a node with network, or set checkpoint.source = "random" or "directory" in the spec',
            ) from error
        raise _refusal(repository, error) from error


def _refusal(repository: str, error: Exception) -> Exception:
    """The hub's answer as a JobError. An error without an HTTP status is returned unchanged."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in {401, 403}:
        return JobError(f"the Hugging Face hub refuses {repository} ({status})", "export HF_TOKEN=<a token with access>")
    if status:
        return JobError(
            f"the Hugging Face hub answers {status} for {repository}", "try again: the download continues where it stopped"
        )
    return error
