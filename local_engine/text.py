"""Owns the way between text and tokens: chat template, encoding, decoding, stop strings; refuses tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from local_engine.errors import InvalidRequest

PROMPT_TAIL = 8
"""Prompt tokens that the decoder sees first, so that a leading space of the answer is kept where it belongs."""


class Text:
    """One model's tokenizer and chat template. Invariant: nothing changes after construction, so any thread may call.

    `render` turns messages into the prompt's text; it raises ValueError (jinja2's and transformers' errors are
    translated by whoever made it) with a message that holds nothing of the messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        render: Callable[[Sequence[Mapping[str, str]]], str],
        *,
        chat_template: str,
        bos_token: str | None,
        eos_token: str | None,
        eos_token_id: int | None,
    ) -> None:
        # A tokenizer.json may carry truncation or padding from training; an engine must never cut a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._render = render
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_id = eos_token_id
        # Ids may have holes, so this is not the number of entries.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of the rendered messages, the opening of the answer included. Raises InvalidRequest."""
        try:
            prompt = self._render(messages)
        except ValueError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        # The template writes the special tokens itself.
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, with the tokenizer's own opening token unless told otherwise."""
        return list(self._tokenizer.encode(prompt, add_special_tokens=special_tokens).ids)

    def decoder(self, prompt: Sequence[int], stop: Sequence[str]) -> AnswerText:
        """The text of an answer to this prompt, token by token."""
        return AnswerText(self._tokenizer, prompt[-PROMPT_TAIL:], stop)

    def tokenizer_json(self) -> str:
        """The tokenizer as tokenizer.json."""
        return str(self._tokenizer.to_str())


class AnswerText:
    """An answer's text as it grows. Invariant: what `add` and `flush` gave never holds a stop string or part of one.

    Incomplete UTF-8 and a possible beginning of a stop string are held back until they are decided.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt_tail), skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.found

    def add(self, token: int) -> str:
        """Text that may be shown now, after one more token."""
        self._undecoded.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._undecoded.clear()
        return self._stop.add(text)

    def flush(self) -> str:
        """What was held back, once no more tokens come. A cut character becomes U+FFFD, as in any decode."""
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=True) if self._undecoded else ""
        self._undecoded.clear()
        return self._stop.add(rest) + self._stop.flush()


class StopStrings:
    """Finds the earliest stop string in text that comes in pieces.

    Invariant: before `found`, the held text is the longest end of what came that could begin a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Text that is certain not to belong to a stop string."""
        if not self._stop:
            return text
        if self.found:
            return ""
        text = self._held + text
        if starts := [start for stop in self._stop if (start := text.find(stop)) >= 0]:
            self.found = True
            self._held = ""
            return text[: min(starts)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
