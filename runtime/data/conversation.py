"""Check one conversation and bring it into the form that chat templates expect.

In: an object with "messages" (role, content) or "conversations" (from, value). Out: {"messages": [...]}, with "tools"
if there are tools.

Accepted beside plain text: content as a list of parts {"type": "text", "text"}, tool calls and tools whose JSON is a
text, and null values, which data sets with columns have. "weight": 0 in an assistant's message takes it out of the
loss, as in OpenAI's format.
"""

import json
from typing import Any

from runtime.data.lines import Example, FaultError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # of roles, in "conversations"


def conversation(document: Example) -> Example:
    """The checked conversation. FaultError: it cannot be trained on."""
    key, messages = _messages(document)
    if not messages:
        raise FaultError(f'"{key}" has no messages')
    checked = [_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if checked[0]["role"] == "assistant":
        raise FaultError("message 1 is the assistant's: it must answer a message")
    if not any(is_trained(message) for message in checked):
        raise FaultError("no message of the assistant has text, so no token would be trained")
    tools = _tools(document.get("tools"))
    return {"messages": checked} | ({"tools": tools} if tools else {})


def is_trained(message: Message) -> bool:
    """Whether the loss counts this message."""
    said = message["role"] == "assistant" and (message["content"] or message.get("tool_calls"))
    return bool(said) and message.get("weight", 1) != 0


def _messages(document: Example) -> tuple[str, list[Any]]:
    """The key of the messages, and the messages with role and content."""
    given = [key for key in ("messages", "conversations") if document.get(key) is not None]
    if len(given) != 1:
        found = "has both" if given else "has neither"
        raise FaultError(f'must have "messages" or "conversations", {found}')
    messages = document[given[0]]
    if not isinstance(messages, list):
        raise FaultError(f'"{given[0]}" is not a list')
    if given[0] == "messages":
        return given[0], messages
    system = document.get("system")
    first = [{"from": "system", "value": system}] if system else []
    return given[0], [_from_value(message) for message in [*first, *messages]]


def _from_value(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message or "value" not in message:
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return rest | {"role": message["from"], "content": message["value"]}


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise FaultError(f"{where} is not an object")
    checked = {key: value for key, value in message.items() if value is not None}
    checked["role"] = role = _role(message.get("role"), where)
    if checked.get("weight", 1) not in (0, 1):
        raise FaultError(f"{where} ({role}): weight must be 0 or 1, found {checked['weight']!r}")
    calls = checked.pop("tool_calls", None)
    if calls:
        checked["tool_calls"] = _calls(calls, f"{where} ({role})")
    checked["content"] = _content(message.get("content"), f"{where} ({role})", optional=bool(calls))
    return checked


def _role(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise FaultError(f"{where} has no role")
    role = OTHER_NAMES.get(given.lower(), given.lower())
    if role not in ROLES:
        raise FaultError(f"{where} has the unknown role {given!r}: must be {', '.join(ROLES)}")
    return role


def _content(content: Any, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise FaultError(f"{where} has no content")
    return content


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise FaultError(f"{where} has content that is not text")
    return text


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls whose arguments are objects. In OpenAI's format they are a text, which templates would quote again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise FaultError(f"{where}: tool_calls is not a list of objects")
    return [_call(call, where) for call in calls]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"], where)}
    if not isinstance(call.get("arguments"), str):
        return call
    return call | {"arguments": _json(call["arguments"], f"{where}: arguments of a tool call")}


def _tools(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        tools = _json(tools, '"tools"') if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FaultError('"tools" is not a list of objects')
    return tools or []


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FaultError(f"{where}: not JSON: {error}") from None
