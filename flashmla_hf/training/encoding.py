"""Contents of rows -> token ids with their marks: which tokens have a loss.

A document ends with the end-of-text token. A chat is what the tokenizer's chat template makes of it. Tokens without a loss
are other messages than the assistant's (``assistant_only_loss``), and prompts (``completion_only_loss``).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flashmla_hf.training.arguments import DataArguments, UserError, first_line
from flashmla_hf.training.formats import Chat, Completion, Content, Messages
from flashmla_hf.training.packing import loss_tokens, marked
from flashmla_hf.training.rows import BadRow

WAY_OUT = "give a template that marks them with {% generation %} by --chat_template_path"


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Gives the tokenizer the chat template of a Jinja file, or of another tokenizer's folder or name."""
    try:
        if Path(path).is_file():
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        raise UserError(f"--chat_template_path {path} cannot be read: {first_line(error)}") from None
    if not tokenizer.chat_template:
        raise UserError(f"--chat_template_path {path}: that tokenizer has no chat template")


class Encoder:
    """Tokenizes contents. Raises UserError if the tokenizer lacks the chat template that a content needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments):
        self.tokenizer = tokenizer
        self.is_assistant_only = data_args.assistant_only_loss
        # As in TRL: rows of prompt and completion train the completion alone, unless asked for all.
        self.is_completion_only = data_args.completion_only_loss is not False
        self.control_tokens = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}

    def encode(self, contents: list[Content]) -> list[np.ndarray | BadRow]:
        """The marked token ids of each content, int32 [length], or why it has none."""
        texts = [content for content in contents if isinstance(content, str)]
        # All at a time: the tokenizer runs them in parallel.
        ids = iter(self.tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [marked(next(ids) + end) if isinstance(content, str) else self._try(content) for content in contents]

    def _try(self, content: Chat | Completion) -> np.ndarray | BadRow:
        try:
            encoded = self._chat(content) if isinstance(content, Chat) else self._completion(content)
        except BadRow as error:
            return error
        return encoded if loss_tokens(encoded) else BadRow("there is nothing in it to train on")

    def _chat(self, chat: Chat) -> np.ndarray:
        if not self.is_assistant_only:
            return marked(self._render(chat.messages, chat.tools))
        return marked(*self._assistant_tokens(chat.messages, chat.tools))

    def _completion(self, row: Completion) -> np.ndarray:
        if isinstance(row.prompt, str):
            return self._text_completion(row.prompt, row.completion)
        whole = row.prompt + row.completion
        ids = self._render(whole, row.tools)
        trained = np.ones(len(ids), dtype=bool)
        if self.is_completion_only:
            goes_on = row.prompt[-1]["role"] == "assistant"
            how = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
            prompt = self._render(row.prompt, row.tools, **how)
            if not _begins(ids, prompt):
                raise BadRow(
                    "the chat template renders the prompt otherwise alone than with its completion, so that the completion's "
                    "tokens are not known: give another template by --chat_template_path, or --completion_only_loss false"
                )
            trained[: len(prompt)] = False
        if self.is_assistant_only:
            trained &= self._assistant_tokens(whole, row.tools)[1]
        return marked(ids, trained)

    def _text_completion(self, prompt: str, completion: str) -> np.ndarray:
        def tokens(text: str, **how) -> list[int]:
            return self.tokenizer(text, verbose=False, **how)["input_ids"]

        end = self.tokenizer.eos_token_id
        ids = tokens(prompt + completion)
        boundary = 0
        if self.is_completion_only:
            head = tokens(prompt)
            if head and head[-1] == end and not _begins(ids, head):  # the tokenizer ends every text by itself
                head = head[:-1]
            if not _begins(ids, head):
                # A token spans the boundary. The prompt's own tokens are what the model will be given.
                joined = head + tokens(completion, add_special_tokens=False)
                if self.tokenizer.decode(joined) != self.tokenizer.decode(ids):
                    raise BadRow(
                        "a token holds the end of the prompt and the beginning of the completion: move the space between them, "
                        "or give --completion_only_loss false"
                    )
                ids = joined
            boundary = len(head)
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        return marked(ids, np.arange(len(ids)) >= boundary)

    def _render(self, messages: Messages, tools: list | None, **how) -> list[int]:
        return self._apply(messages, tools, **how)["input_ids"]

    def _apply(self, messages: Messages, tools: list | None, **how) -> dict:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, and the data holds messages: give one by --chat_template_path (a Jinja "
                "file, or the folder or name of a tokenizer that has one)"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **how
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise BadRow(f"the chat template refuses the messages: {first_line(error)}") from None

    def _assistant_tokens(self, messages: Messages, tools: list | None) -> tuple[list[int], np.ndarray]:
        """The ids of the chat, and which of them the assistant wrote, bool [length]."""
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow("there is no message of the role 'assistant' to train on")
        template = self.tokenizer.get_chat_template(tools=tools) if self.tokenizer.chat_template else ""
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            found = self._apply(messages, tools, return_assistant_tokens_mask=True)
            return found["input_ids"], np.array(found["assistant_masks"], dtype=bool)
        return self._assistant_tokens_by_prefixes(messages, tools, template)

    def _assistant_tokens_by_prefixes(
        self, messages: Messages, tools: list | None, template: str
    ) -> tuple[list[int], np.ndarray]:
        """As ``_assistant_tokens``, for a template that does not mark them.

        A message is what the chat up to it has beyond the chat before it with the assistant's header. Both must be a beginning
        of the whole chat, token by token; else the row is refused.
        """
        ids = self._render(messages, tools)
        trained = np.zeros(len(ids), dtype=bool)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise BadRow(
                    f"the first message is the assistant's, whose tokens this chat template does not mark: {WAY_OUT}"
                )
            before = self._render(messages[:i], tools, add_generation_prompt=True)
            through = self._render(messages[: i + 1], tools) if i + 1 < len(messages) else ids
            is_exact = _begins(ids, through) and _begins(through, before)
            if is_exact and "add_generation_prompt" not in template:
                # There may be a header that the template never leaves open: its tokens would be taken for the message's.
                text = self.tokenizer.decode(ids[len(before) : len(through)]).lstrip()
                is_exact = bool(message["content"].strip()) and text.startswith(message["content"].strip())
            if not is_exact:
                raise BadRow(
                    f"the tokens of message {i + 1} are not known: the chat template renders the chat up to it otherwise alone "
                    f"than within the whole, and does not mark the assistant's tokens; {WAY_OUT}"
                )
            trained[len(before) : self._end_of_turn(ids, len(before), len(through))] = True
        return ids, trained

    def _end_of_turn(self, ids: list[int], start: int, stop: int) -> int:
        """``stop``, less the blank tokens after the control token that ends the turn: the model is never to write them."""
        end = stop
        while (
            end > start and ids[end - 1] not in self.control_tokens and not self.tokenizer.decode(ids[end - 1]).strip()
        ):
            end -= 1
        return end if end > start and ids[end - 1] in self.control_tokens else stop


def _begins(ids: list[int], beginning: list[int]) -> bool:
    return ids[: len(beginning)] == beginning
