"""Whether there is a Hugging Face token. The token itself is never returned, printed or written.

In: the environment. Out: the path of the token file; whether huggingface_hub will find a token.

Environment: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH, HF_HOME, XDG_CACHE_HOME.
"""

import os
from pathlib import Path


def token_file() -> Path:
    """Path of the file in which `hf auth login` keeps the token."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.environ.get("HF_TOKEN_PATH") or f"{os.environ.get('HF_HOME') or f'{cache}/huggingface'}/token"
    return Path(os.path.expandvars(path)).expanduser()


def has_token() -> bool:
    """Whether the environment or the token file has a token."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    try:
        return bool(token_file().read_text().strip())
    except OSError:
        return False
