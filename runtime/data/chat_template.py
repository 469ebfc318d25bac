"""Render a conversation with a chat template, and find the text that the loss counts.

In: a Hugging Face tokenizer and a checked conversation. Out: the text, and the spans of the assistant's messages.

The span of a message is found by rendering: it begins where the text of all messages before it ends, with the
template's prompt for an answer, and ends where the text with the message ends. This needs no {% generation %} tag in the
template. Llama-3's own template has none, and then NeMo 2.7.3 would train on every token (found with
`create_sft_dataset(chat=True)`: 231 of 231 tokens).
"""

from typing import Any, NamedTuple

from runtime.data.conversation import is_trained
from runtime.data.lines import Example, FaultError
from runtime.job.errors import JobError


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]  # characters that the loss counts: first, and one after the last


class ChatTemplate:
    """The chat template of a tokenizer, or the one that the plan carries."""

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        """`text` replaces the tokenizer's own template. JobError: there is no template."""
        if not text and not tokenizer.chat_template:
            raise JobError(
                "the tokenizer of this model has no chat template",
                'set data.chat_template = "file.jinja" in the spec, or choose an Instruct model',
            )
        self.tokenizer, self.text = tokenizer, text

    def render(self, conversation: Example) -> Rendered:
        """The text of a conversation. FaultError: the template refuses it, or gives a text that has no clear spans."""
        messages, tools = conversation["messages"], conversation.get("tools")
        self._require_support(messages, tools)
        whole = self._render(messages, tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                span = self._span(messages, number, tools, whole)
                spans += [span] if is_trained(message) else []
        return Rendered(whole, spans)

    def _span(self, messages: list[Any], number: int, tools: Any, whole: str) -> tuple[int, int]:
        last = number + 1 == len(messages)
        through = whole if last else self._render(messages[: number + 1], tools)
        if not whole.startswith(through):
            raise FaultError(
                f"the chat template gives messages 1 to {number + 1} another text when more messages follow, "
                "so the assistant's part cannot be told"
            )
        before = self._render(messages[:number], tools, prompt=True)
        if not through.startswith(before):
            raise FaultError(
                f"the chat template begins message {number + 1} (assistant) with another text than its prompt for an answer"
            )
        return len(before), len(through)

    def _render(self, messages: list[Any], tools: Any, *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.text, add_generation_prompt=prompt, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise FaultError(f"the chat template refuses it: {error}") from error
        return str(text)

    def _require_support(self, messages: list[Any], tools: Any) -> None:
        """FaultError if the template would leave out a part of the conversation without a word."""
        source = self.tokenizer.get_chat_template(self.text, tools=tools)
        needs = {
            "tools": bool(tools),
            "tool_calls": any("tool_calls" in message for message in messages),
            "tool": any(message["role"] == "tool" for message in messages),
        }
        for word, needed in needs.items():
            if needed and word not in source:
                what = 'messages of the role "tool"' if word == "tool" else f'"{word}"'
                raise FaultError(f"has {what}, but the chat template has no place for them")
