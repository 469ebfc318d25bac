"""A tokenizer with Llama-3's special tokens and a chat template, and what its tokens say."""

import json
from pathlib import Path
from typing import Any

from stages import plan

from runtime.data import order, prepare, store
from runtime.data.tokenizer import Tokenizer, Tokens
from runtime.weights import checkpoint, random_llama

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


FACTS = [
    said("system: Answer briefly.", "user: What is the capital of France?", "assistant: Paris."),
    said("user: How many legs has a spider?", "assistant: Eight.", "user: And an ant?", "assistant: Six."),
    said("user: At how many degrees does water boil?", "assistant: At 100 degrees Celsius, at sea level."),
]
CHANGES: dict[str, Any] = {
    "seq_length": 256,
    "checkpoint": {"source": "directory", "path": "hf"},
    "data": {"kind": "chat", "path": "chat.jsonl"},
}


def epochs(count: int) -> dict[str, Any]:
    """Changes to a spec."""
    return {"max_steps": None, "epochs": count}


def write_base_and_chats(folder: Path) -> None:
    """A tiny Llama with the tokenizer and the chat template of an Instruct model, and a file of conversations."""
    random_llama.write(plan(), folder / "hf")
    write_tokenizer(folder / "hf", template("llama3"))
    (folder / "chat.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS * 7))


def first_loss(document: dict[str, Any], folder: Path) -> float:
    """The loss of the first batch, as transformers computes it from our masks. STAGE_PATH must be set."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = prepare.tokenize(document, checkpoint.tokenizer(document))
    examples = store.Examples(tokens, "training")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", torch_dtype=torch.float32)
    total, count = 0.0, 0
    for place in range(document["global_batch_size"]):
        ids, trained, _ = examples[order.sample(place, len(examples), document["seed"])]
        row = torch.tensor(ids.tolist())[None]
        labels = row.masked_fill(~torch.tensor(trained.tolist())[None], -100)
        number = int(trained[1:].sum())
        total += model(input_ids=row, labels=labels).loss.item() * number
        count += number
    return total / count
