"""Conversations: what is accepted, what is refused, and which tokens the loss counts. Needs no NeMo."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import marked, said, template, write_tokenizer

from runtime.data import chat, lines
from runtime.data.conversation import conversation
from runtime.data.lines import FaultError
from runtime.data.tokenizer import Tokenizer, Tokens
from runtime.job.errors import JobError

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template("llama3"))


@pytest.fixture(scope="module")
def llama3(folder: Path) -> Tokenizer:
    return Tokenizer(folder, None)


def tokens_of(tokenizer: Tokenizer, document: dict[str, Any]) -> Tokens:
    (found,) = tokenizer.tokens([conversation(document)])
    if isinstance(found, FaultError):
        raise found
    return found


def fault(tokenizer: Tokenizer, document: dict[str, Any]) -> str:
    with pytest.raises(FaultError) as caught:
        tokens_of(tokenizer, document)
    return str(caught.value)


def head(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


# --- what is trained


def test_the_loss_is_on_the_assistants_text_and_its_end(llama3: Tokenizer) -> None:
    tokens = tokens_of(llama3, said("system: be brief", "user: who", "assistant: a boy", "user: where", "assistant: home"))
    assert marked(llama3, tokens) == (
        f"<|begin_of_text|>{head('system')}be brief<|eot_id|>{head('user')}who<|eot_id|>"
        f"{head('assistant')}{{a boy<|eot_id|>}}{head('user')}where<|eot_id|>{head('assistant')}{{home<|eot_id|>}}"
    )


def test_the_tokens_are_those_of_the_tokenizers_own_template(llama3: Tokenizer) -> None:
    for document in (
        said("user: who are you", "assistant: a boy"),
        said("system: Antworte kurz. ☃", "user: wër?\n\n", "assistant:   Zwei  Leerzeichen\n", "user: ", "assistant: ja"),
    ):
        own = llama3.own.apply_chat_template(conversation(document)["messages"], tokenize=True)
        assert tokens_of(llama3, document).ids.tolist() == own
        assert own.count(llama3.own.bos_token_id) == 1
        assert llama3.own("x").input_ids[0] == llama3.own.bos_token_id  # the tokenizer itself would add one more


def test_nothing_of_a_turn_is_lost_at_its_borders(llama3: Tokenizer) -> None:
    answer = "é日本 \n\n\tfn main() {}\n  x"
    tokens = tokens_of(llama3, said("user: x", f"assistant: {answer}", "user: y"))
    assert llama3.text(tokens.ids[tokens.trained].tolist()) == f"{answer.strip()}<|eot_id|>"


def test_a_template_of_the_spec_replaces_the_tokenizers(folder: Path) -> None:
    other = Tokenizer(folder, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert marked(other, tokens_of(other, said("user: who", "assistant: a boy"))) == "user: who\n{assistant: a boy\n}"


def test_a_generation_tag_does_no_harm(folder: Path) -> None:
    with_tag = template("llama3").replace("message['content'] | trim", "'' }}{% generation %}{{ message['content'] | trim")
    with_tag = with_tag.replace("'<|eot_id|>' }}", "'<|eot_id|>' }}{% endgeneration %}", 1)
    tagged, plain = Tokenizer(folder, with_tag), Tokenizer(folder, None)
    document = said("user: who", "assistant: a boy", "user: where", "assistant: home")
    assert marked(tagged, tokens_of(tagged, document)) == marked(plain, tokens_of(plain, document))


def test_a_conversation_that_ends_with_the_user_trains_the_answers_before(llama3: Tokenizer) -> None:
    assert marked(llama3, tokens_of(llama3, said("user: a", "assistant: b", "user: c"))).count("{") == 1


def test_a_weight_of_zero_takes_a_message_out_of_the_loss(llama3: Tokenizer) -> None:
    document = said("user: a", "assistant: wrong", "user: b", "assistant: right")
    document["messages"][1]["weight"] = 0
    assert marked(llama3, tokens_of(llama3, document)).partition("{")[2] == "right<|eot_id|>}"


def test_an_empty_answer_is_rendered_but_not_trained(llama3: Tokenizer) -> None:
    text = marked(llama3, tokens_of(llama3, said("system: ", "user: a", "assistant: ", "user: b", "assistant: c")))
    assert f"{head('system')}<|eot_id|>" in text
    assert f"{head('assistant')}<|eot_id|>" in text
    assert text.count("{") == 1


# --- other forms of the same


def test_conversations_of_from_and_value_mean_the_same(llama3: Tokenizer) -> None:
    names = [("User", "Assistant"), ("human", "gpt")]
    expected = tokens_of(llama3, said("system: be brief", "user: who", "assistant: a boy")).ids.tolist()
    for user, assistant in names:
        turns = [{"from": user, "value": "who"}, {"from": assistant, "value": "a boy", "mask": None}]
        assert tokens_of(llama3, {"system": "be brief", "conversations": turns}).ids.tolist() == expected


def test_content_in_parts_and_null_values_mean_the_same(llama3: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "boy"}]
    document = said("user: who")
    document["messages"].append({"role": "assistant", "content": parts, "tool_calls": None, "name": None})
    assert tokens_of(llama3, document | {"tools": None}).ids.tolist() == (
        tokens_of(llama3, said("user: who", "assistant: a boy")).ids.tolist()
    )


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def with_tools(arguments: Any, tools: Any = TOOLS) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "2 + 3"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "It is 5."},
        ],
        "tools": tools,
    }


@pytest.mark.parametrize(("arguments", "tools"), [({"a": 2, "b": 3}, TOOLS), ('{"a": 2, "b": 3}', json.dumps(TOOLS))])
def test_tool_calls_are_trained_and_the_tools_answers_are_not(folder: Path, arguments: Any, tools: Any) -> None:
    tokenizer = Tokenizer(folder, template("tools"))
    text = marked(tokenizer, tokens_of(tokenizer, with_tools(arguments, tools)))
    assert f'{head("assistant")}{{add {{"a": 2, "b": 3}}<|eot_id|>}}{head("tool")}5<|eot_id|>' in text
    assert text.endswith(f"{head('assistant')}{{It is 5.<|eot_id|>}}")
    assert "Tools: [" in text


def test_tools_that_the_template_would_leave_out_are_refused(llama3: Tokenizer) -> None:
    document = with_tools({})
    assert fault(llama3, document) == 'has "tools", but the chat template has no place for them'
    assert fault(llama3, document | {"tools": []}) == 'has "tool_calls", but the chat template has no place for them'
    alone = said("user: a", "tool: 5", "assistant: b")
    assert fault(llama3, alone) == 'has messages of the role "tool", but the chat template has no place for them'


# --- what is refused


def test_a_template_that_changes_earlier_text_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer(folder, template("late_system"))
    tokens_of(tokenizer, said("system: be brief", "user: a", "assistant: b"))  # one turn has nothing earlier
    text = fault(tokenizer, said("system: be brief", "user: a", "assistant: b", "user: c", "assistant: d"))
    assert text.startswith("the chat template gives messages 1 to 3 another text when more messages follow")


def test_a_template_whose_prompt_is_not_how_it_begins_an_answer_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer(
        folder, template("llama3").replace("{{ '<|start_header_id|>assistant", "{{ '<|start_header_id|>model")
    )
    assert fault(tokenizer, said("user: a", "assistant: b")).startswith("the chat template begins message 2 (assistant)")


def test_what_a_template_raises_is_told(folder: Path) -> None:
    tokenizer = Tokenizer(folder, "{{ raise_exception('roles must alternate') }}")
    assert fault(tokenizer, said("user: a", "assistant: b")) == "the chat template refuses it: roles must alternate"


def test_no_template_at_all_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path), None)
    with pytest.raises(JobError, match=r"has no chat template\n  hint: set data.chat_template"):
        tokenizer.tokens([conversation(said("user: a", "assistant: b"))])


FAULTY: dict[str, tuple[Any, str]] = {
    "neither": ({"text": "a"}, 'must have "messages" or "conversations", has neither'),
    "both": (said("user: a") | {"conversations": []}, 'must have "messages" or "conversations", has both'),
    "no list": ({"messages": "a"}, '"messages" is not a list'),
    "no messages": ({"messages": []}, '"messages" has no messages'),
    "no object": ({"messages": ["a"]}, "message 1 is not an object"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 has no role"),
    "unknown role": (
        said("user: a", "boss: b"),
        "message 2 has the unknown role 'boss': must be system, user, assistant, tool",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 (user) has no content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "message 1 (user) has content that is not text",
    ),
    "assistant first": (said("assistant: a"), "message 1 is the assistant's: it must answer a message"),
    "nothing trained": (said("user: a", "user: b"), "no message of the assistant has text, so no token would be trained"),
    "only empty answers": (
        said("user: a", "assistant: "),
        "no message of the assistant has text, so no token would be trained",
    ),
    "weight": (
        {"messages": [{"role": "user", "content": "a", "weight": 0.5}]},
        "message 1 (user): weight must be 0 or 1, found 0.5",
    ),
    "tools": (said("user: a", "assistant: b", tools="{"), '"tools": not JSON: Expecting property name'),
    "arguments": (with_tools("{"), "message 2 (assistant): arguments of a tool call: not JSON: Expecting property name"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_conversation_says_what_is_wrong(case: str) -> None:
    document, text = FAULTY[case]
    with pytest.raises(FaultError) as caught:
        conversation(document)
    assert str(caught.value).startswith(text)


def test_faulty_lines_are_numbered(tmp_path: Path) -> None:
    good = json.dumps(said("user: a", "assistant: b")).encode()
    bad = [b'{"messages": []}', b"nonsense", b'{"messages": "\xff"}', b'{"messages": "\\ud800"}', b"[]"]
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\n".join([good, *bad, b"", good]))
    with pytest.raises(JobError) as caught:
        lines.read(file, conversation, chat.HINT)
    expected = (
        "has no messages",
        "not JSON",
        "not UTF-8: byte 0xff at column 15",
        "has half of a surrogate",
        "not an object",
    )
    for number, text in enumerate(expected, 2):
        assert f"{file}:{number}: " in caught.value.what
        assert text in caught.value.what


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    good = json.dumps(said("user: a", "assistant: b")).encode()
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + good + b"\r\n")
    assert [example["line"] for example in lines.read(tmp_path / "mine.jsonl", conversation, "")] == [1, 2]
