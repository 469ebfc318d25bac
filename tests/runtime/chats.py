"""A tokenizer with Llama-3's special tokens and a chat template, and what its tokens say."""

import json
from pathlib import Path
from typing import Any

from runtime.data.tokenizer import Tokenizer, Tokens
from runtime.weights import random_llama

TEMPLATES = (Path(__file__).with_name("templates"), Path(__file__).parents[2] / "specs" / "data")
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
VOCABULARY = 512  # of tiny_llama


def template(name: str) -> str:
    """The text of a template, as a spec carries it."""
    return next(folder / f"{name}.jinja" for folder in TEMPLATES if (folder / f"{name}.jinja").exists()).read_text()


def write_tokenizer(folder: Path, chat_template: str | None = None) -> Path:
    """A tokenizer of 512 entries, the last three Llama-3's special tokens. <|eot_id|> ends a text, as for chats."""
    folder.mkdir(parents=True, exist_ok=True)
    random_llama.write_tokenizer(VOCABULARY - len(SPECIAL), 8192, folder)
    from tokenizers import Tokenizer as Core
    from tokenizers.processors import TemplateProcessing

    core = Core.from_file(str(folder / "tokenizer.json"))
    assert core.add_special_tokens(SPECIAL) == len(SPECIAL)
    assert core.get_vocab_size() == VOCABULARY
    begin = (random_llama.SPECIAL[0], 0)
    core.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])  # as Llama-3's own tokenizer
    core.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token": "<|eot_id|>"}))
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def marked(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """The text, with braces around what is trained."""
    text, inside = "", False
    for number, trained in zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True):
        if trained != inside:
            text += "{" if trained else "}"
            inside = trained
        text += tokenizer.text([number])
    return text + ("}" if inside else "")


def said(*turns: str, **more: Any) -> dict[str, Any]:
    """A conversation from `role: text` turns."""
    pairs = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": role, "content": text} for role, _, text in pairs], **more}
