"""Turn examples into tokens, and mark the tokens that the loss counts.

In: examples ({"input", "output"} or {"messages"}) and a Hugging Face tokenizer. Out: `Tokens` for each example.

An input and an output give the same tokens as in NeMo's own data set: input, space, output, end of text. A conversation
gives the tokens of its chat template. Nothing is added to them: the template itself writes the tokens that begin and
end a text, as the model was trained.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.data.chat_template import ChatTemplate
from runtime.data.lines import Example, FaultError
from runtime.job.errors import JobError

PARALLEL = "TOKENIZERS_PARALLELISM"  # read by the library at each call; the recipe switches it off for the training


class Tokens(NamedTuple):
    """One example."""

    ids: "np.ndarray[Any, Any]"  # int32 [length]
    trained: "np.ndarray[Any, Any]"  # bool [length]: whether the loss counts the prediction of this token
    prompt: int | None  # number of tokens before the output; None for a conversation


class Tokenizer:
    """A Hugging Face tokenizer with the plan's chat template."""

    def __init__(self, folder: Path, chat_template: str | None) -> None:
        """JobError: the folder has no fast tokenizer, or the tokenizer has no token for the end of a text."""
        from transformers import AutoTokenizer

        self.own = AutoTokenizer.from_pretrained(str(folder), use_fast=True)
        if not self.own.is_fast:
            raise JobError(
                f"{folder} has no tokenizer.json", "save the tokenizer again with transformers: it writes this file"
            )
        self._chat_template = chat_template
        self._template: ChatTemplate | None = None
        # NeMo puts a space before the output, unless the tokenizer begins every text with one
        spaced = self.own.tokenize("x y") != self.own.tokenize("x") + self.own.tokenize("y")
        self._output_prefix = " " if spaced else ""

    def identity(self) -> dict[str, Any]:
        """What identifies the tokenizer. It is the same for the converted checkpoint and for the model's own files."""
        template = self._chat_template or self.own.chat_template
        parts = {"tokenizer": self.own.backend_tokenizer.to_str(), "chat_template": json.dumps(template, sort_keys=True)}
        special = {key: str(token) for key, token in self.own.special_tokens_map.items()}
        return {name: sha256(text.encode()).hexdigest() for name, text in parts.items()} | {"special_tokens": special}

    def tokens(self, examples: list[Example]) -> list[Tokens | FaultError]:
        """The tokens of each example, or what is wrong with it."""
        if not examples:
            return []
        return self._conversations(examples) if "messages" in examples[0] else self._pairs(examples)

    def text(self, ids: list[int]) -> str:
        """The text of some tokens, with special tokens."""
        return str(self.own.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _pairs(self, examples: list[Example]) -> list[Tokens | FaultError]:
        if (end := self.own.eos_token_id) is None:
            raise JobError("the tokenizer of this model has no eos_token", "add eos_token to its tokenizer_config.json")
        inputs = self._encode([example["input"].strip(" ") for example in examples])
        outputs = self._encode([self._output_prefix + example["output"].strip(" ") for example in examples])
        return [_pair(before, [*after, end]) for before, after in zip(inputs.input_ids, outputs.input_ids, strict=True)]

    def _conversations(self, examples: list[Example]) -> list[Tokens | FaultError]:
        self._template = self._template or ChatTemplate(self.own, self._chat_template)
        rendered = [_or_fault(self._template.render, example) for example in examples]
        texts = [each.text for each in rendered if not isinstance(each, FaultError)]
        encoded = self._encode(texts, return_offsets_mapping=True) if texts else None
        found: list[Tokens | FaultError] = []
        for each in rendered:
            if isinstance(each, FaultError):
                found.append(each)
            elif encoded:
                number = sum(not isinstance(one, FaultError) for one in found)
                found.append(_conversation(encoded.input_ids[number], encoded.offset_mapping[number], each.spans))
        return found

    def _encode(self, texts: list[str], **options: Any) -> Any:
        with _in_parallel():
            return self.own(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def _or_fault(render: Any, example: Example) -> Any:
    try:
        return render(example)
    except FaultError as fault:
        return fault


def _pair(before: list[int], after: list[int]) -> Tokens:
    trained = np.arange(len(before) + len(after)) >= len(before)
    return Tokens(np.array(before + after, np.int32), trained, len(before))


def _conversation(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Tokens | FaultError:
    """A token counts for the span in which its last character is. Offsets can leave out spaces at a token's beginning."""
    ends = np.array([end for _, end in offsets], np.int64)
    trained = np.zeros(len(ids), bool)
    for first, end in spans:
        trained |= (ends > first) & (ends <= end)
    if not trained[1:].any():
        return FaultError("no token would be trained")
    return Tokens(np.array(ids, np.int32), trained, None)


@contextmanager
def _in_parallel() -> Iterator[None]:
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ.pop(PARALLEL) if before is None else os.environ.__setitem__(PARALLEL, before)
