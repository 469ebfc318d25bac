"""The Hugging Face hub, as far as a conversion needs it. In: a repository, a revision. Out: a directory, or JobError.

The token is huggingface_hub's own affair (HF_TOKEN, or the file HF_TOKEN_PATH): it is never passed on or shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError

# What the importer reads. Not Meta's own format, which many repositories carry too ("original/", *.pth).
PATTERNS = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.safetensors*"]
OUTSIDE = ["*/*"]  # the patterns match in folders too


class UnreachableError(JobError):
    """There is no way to the hub from here."""


def download(repository: str, revision: str | None) -> Path:
    """The repository's files in $HF_HOME's cache, the newest of the revision; a broken download goes on."""
    from huggingface_hub import snapshot_download

    with _plain_errors(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=PATTERNS, ignore_patterns=OUTSIDE))


def bytes_to_download(repository: str, revision: str | None) -> int:
    """Bytes of the files that `download` still lacks."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    try:
        with _plain_errors(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except UnreachableError:
        return 0  # all may be in the cache: `download` tells
    wanted = filter_repo_objects(
        info.siblings or [], allow_patterns=PATTERNS, ignore_patterns=OUTSIDE, key=lambda file: str(file.rfilename)
    )
    missing = [
        file for file in wanted if not isinstance(try_to_load_from_cache(repository, file.rfilename, revision=info.sha), str)
    ]
    return sum(file.size or 0 for file in missing)


def has_token() -> bool:
    """Whether there is a token to show, in the environment or in a file."""
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
            f"{repository} is not on the Hugging Face hub, or may not be seen with this token",
            f"look at {page}, and export HF_TOKEN=<your token> if it is private",
        ) from error
    except Exception as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError)
        if offline or any(word in type(error).__name__ for word in ("Connect", "Timeout")):
            raise UnreachableError(
                f"{repository} is not in the cache, and the Hugging Face hub cannot be reached from here",
                'convert on a node with network, or set checkpoint.source = "random" or "directory" in the spec',
            ) from error
        raise _refusal(repository, error) from error


def _refusal(repository: str, error: Exception) -> Exception:
    """What the hub answers, in one line; an error of another kind as it is."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in {401, 403}:
        return JobError(f"the Hugging Face hub refuses {repository} ({status})", "export HF_TOKEN=<a token with access>")
    if status:
        return JobError(f"the Hugging Face hub answers {status} for {repository}", "try again: a broken download goes on")
    return error
