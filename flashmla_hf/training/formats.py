"""What the columns of a row mean: text, a chat, or a prompt with its completion. The names are TRL's.

text                    a document; --dataset_text_field names another column
messages                a list of {"role", "content"}; ``conversations`` of {"from", "value"}, as ShareGPT writes them
prompt and completion   two strings, or two lists of messages
tools                   beside messages: what the chat template is given as tools
"""

from __future__ import annotations

from dataclasses import dataclass

from flashmla_hf.training.arguments import DataArguments
from flashmla_hf.training.rows import BadRow, Row, parse_json

Messages = list[dict]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # a role of another name is the same in both


@dataclass(frozen=True)
class Chat:
    messages: Messages
    tools: list | None = None


@dataclass(frozen=True)
class Completion:
    """Both are strings, or both are messages."""

    prompt: str | Messages
    completion: str | Messages
    tools: list | None = None


Content = str | Chat | Completion  # what a row holds; a string is a document


class Formats:
    """Finds the format of rows, and reads it. ``choose`` and ``content`` raise BadRow for a row that has none."""

    def __init__(self, data_args: DataArguments):
        self.text_field = data_args.dataset_text_field
        self.wants_assistant = data_args.assistant_only_loss
        self.wants_completion = bool(data_args.completion_only_loss)
        chats, completion, text = [("messages",), ("conversations",)], [("prompt", "completion")], [(self.text_field,)]
        # A row may have columns of several formats: the first of these counts.
        if self.wants_completion:
            self.known = completion
        elif self.text_field != "text":
            self.known = text
        elif self.wants_assistant:
            self.known = chats + completion
        else:
            self.known = text + chats + completion

    def choose(self, columns: list[str]) -> list[str]:
        """The columns to read, of all ``columns`` of a row."""
        for names in self.known:
            if set(names) <= set(columns):
                return [*names, "tools"] if "tools" in columns and names != ("text",) else [*names]
        raise BadRow(self._no_format(columns))

    def _no_format(self, columns: list[str]) -> str:
        if self.wants_completion:
            return f"--completion_only_loss: expected the columns 'prompt' and 'completion', got {columns}"
        if self.wants_assistant:
            return (
                f"--assistant_only_loss: expected a column of messages ('messages', 'conversations', or 'prompt' and "
                f"'completion'), got {columns}"
            )
        others = "" if self.text_field != "text" else ", nor 'messages', 'conversations', 'prompt' and 'completion'"
        return f"no column {self.text_field!r}, only {columns}{others}: name one with --dataset_text_field"

    def content(self, row: Row) -> Content:
        """What the row holds. Raises BadRow if that is nothing, or not of its format."""
        if isinstance(row, BadRow):
            raise row
        if isinstance(row, str):
            if self.wants_assistant or self.wants_completion:
                raise BadRow(self._no_format(["text"]))
            return row
        columns = self.choose(list(row))
        tools = _tools(row["tools"]) if "tools" in columns else None
        if columns[0] == "prompt":
            return self._completion(row["prompt"], row["completion"], tools)
        value = row[columns[0]]
        # The column that --dataset_text_field names may hold messages, whatever it is called.
        if isinstance(value, list) or columns[0] in ("messages", "conversations"):
            return Chat(_messages(value, columns[0]), tools)
        if self.wants_assistant:
            raise BadRow(f"--assistant_only_loss: expected messages in column {columns[0]!r}, got text")
        return _text(value, columns[0])

    def _completion(self, prompt: object, completion: object, tools: list | None) -> Completion:
        if isinstance(prompt, str) and isinstance(completion, str):
            if self.wants_assistant:
                raise BadRow("--assistant_only_loss: expected messages in 'prompt' and 'completion', got text")
            if not completion:
                raise BadRow("the completion is empty")
            return Completion(_text(prompt, "prompt"), _text(completion, "completion"), tools)
        if isinstance(prompt, list) and isinstance(completion, list):
            return Completion(_messages(prompt, "prompt"), _messages(completion, "completion"), tools)
        got = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise BadRow(f"expected two strings or two lists of messages in 'prompt' and 'completion', got {got}")


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"expected text, got {type(value).__name__} (column {column!r})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"character {error.start} is half of a pair (a lone surrogate; column {column!r})") from None
    return value


def _tools(value: object) -> list | None:
    if isinstance(value, str):  # JSON: a column of tools has no one type otherwise
        try:
            value = parse_json(value) if value.strip() else None
        except BadRow as error:
            raise BadRow(f"the column 'tools' is not JSON: {error}") from None
    if value is not None and not isinstance(value, list):
        raise BadRow(f"expected a list of tools, got {type(value).__name__}")
    return _without_none(value) or None


def _without_none(value):
    """datasets and parquet fill a key that a row does not have with None. Chat templates would print it."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _messages(value: object, column: str) -> Messages:
    if not isinstance(value, list):
        raise BadRow(f"expected a list of messages in column {column!r}, got {type(value).__name__}")
    if not value:
        raise BadRow(f"the list of messages in column {column!r} is empty")
    return [_message(item, f"message {number}") for number, item in enumerate(value, start=1)]


def _message(item: object, where: str) -> dict:
    if not isinstance(item, dict):
        raise BadRow(f"{where}: expected an object with 'role' and 'content', got {type(item).__name__}")
    message = _without_none(item)
    if "role" not in message and "from" in message:
        message["role"] = SHAREGPT_ROLES.get(message["from"], message["from"])
        message["content"] = message.pop("value", None)
        del message["from"]
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRow(f"{where}: expected 'role' and 'content' (or 'from' and 'value'), got {list(item)}")
    if isinstance(content, list):  # parts
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow(f"{where}: expected text, got parts of other kinds")
        content = "".join(parts)
    if content is None and message.get("tool_calls"):
        content = ""
    return message | {"content": _text(content, f"{where}, content")}
