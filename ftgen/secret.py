"""Finds secrets: by the names of variables, and by the forms of the values in a text.

In: a name, or a text (`bytes`). Out: whether the name is that of a secret, or the text without secrets.
"""

import re

# The name of a variable that may hold a secret.
SECRET = re.compile(r"TOKEN$|TOKEN_|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
# A variable of Hugging Face tokenizers: no secret.
NOT_SECRET = {"TOKENIZERS_PARALLELISM"}
REMOVED = b"[removed]"

# Values that are secrets by their beginning, as the services that give them document it.
FORMS = re.compile(
    rb"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    rb"|wandb_v\d+_\w{20,}"  # Weights & Biases
    rb"|nvapi-[\w-]{20,}"  # NVIDIA
    rb"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    rb"|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}"  # OpenAI and others, Slack, Amazon
    rb"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}"  # a JSON Web Token, RFC 7519
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
)
BEARER = re.compile(rb"(?i)(\b(?:bearer|basic)\s+)[\w.~+/-]{8,}=*")  # an HTTP header, RFC 6750
IN_URL = re.compile(rb"(://[^\s/:@]{1,200}:)[^\s/@]{1,200}(?=@)")  # https://user:password@host
# NAME=VALUE, NAME: VALUE, "NAME": "VALUE". A number or a word of JSON is no secret.
ASSIGNED = re.compile(
    rb"(?i)(\b\w*(?:TOKEN\b|TOKEN_|SECRET|PASSWORD|PASSWD|CREDENTIAL|(?:API|ACCESS|PRIVATE)[_-]?KEY)\w*\\?[\"']?\s?[=:]\s?\\?[\"']?)"
    rb"(?!(?:\d{1,7}|true|false|null|none)\b)[^\s\"',;}\\]+"
)
WANDB = re.compile(rb"(?i)wandb|api.?key")
LINE_OF_WANDB = re.compile(rb"(?i)[^\n]*(?:wandb|api.?key)[^\n]*")
HEX = re.compile(rb"\b[0-9a-f]{40}\b")  # a key of Weights & Biases before its v1


def is_secret(name: str) -> bool:
    """Whether a variable of this name may hold a secret."""
    return bool(SECRET.search(name)) and name not in NOT_SECRET


def without_secrets(text: bytes) -> bytes:
    """The text with `[removed]` in the place of each secret that has a known form or a name."""
    text = FORMS.sub(REMOVED, text)
    text = BEARER.sub(rb"\1" + REMOVED, text)
    text = IN_URL.sub(rb"\1" + REMOVED, text)
    text = ASSIGNED.sub(rb"\1" + REMOVED, text)
    if WANDB.search(text):
        text = LINE_OF_WANDB.sub(lambda line: HEX.sub(REMOVED, line[0]), text)
    return text
