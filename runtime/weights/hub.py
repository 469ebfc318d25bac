"""Name the repository of a model's weights, and the files of it that the importer reads.

In: a plan with checkpoint.source = "hub". Out: a `Repository`.
"""

from typing import Any

from runtime.hub.repository import Repository
from runtime.weights import base

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*")
# What the importer reads, or an export needs. Many repositories also have the weights in other formats: "original/" and
# *.pth of Meta, consolidated.* of Mistral.
WANTED = (*base.SMALL, "model*.safetensors*")
NEEDED = ("config.json", "tokenizer.*", "model*.safetensors")


def repository(plan: dict[str, Any]) -> Repository:
    """The repository of the plan's model."""
    return Repository(plan["model"]["hf_id"], "model", plan["checkpoint"]["revision"] or "main", WANTED, NEEDED)


def tokenizer(plan: dict[str, Any]) -> Repository:
    """The same repository, without the weights."""
    return repository(plan)._replace(wanted=TOKENIZER, needed=("tokenizer.*",))
