"""Owns the way between text and tokens: chat template, encoding, decoding, stop strings; refuses tensors.

What a message says is text: a special token that is written in it, such as one that ends a turn, does not act as one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from tokenizers import AddedToken, Tokenizer
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
        special = {t.content: (id, t) for id, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._special = {content: id for content, (id, _) in special.items()}
        # The longest first, where one begins another. Without any, a pattern that nothing matches.
        longest_first = sorted(special, key=len, reverse=True)
        patterns = [_pattern(special[content][1]) for content in longest_first]
        self._any_special = re.compile("|".join(patterns) or r"(?!)")
        # A tokenizer of its own, because this is a setting of the object and threads share it.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_id = eos_token_id
        # Ids may have holes, so this is not the number of entries.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of the rendered messages, the opening of the answer included. Raises InvalidRequest.

        The special tokens are those that the template writes; in the messages they are plain text.
        """
        if any(self._any_special.search(message["content"]) for message in messages):
            return self._encode_quoting(messages)
        # The template writes the special tokens itself.
        return _ids(self._tokenizer, self._rendered(messages))

    def _encode_quoting(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As `encode_chat`, for messages in which special tokens are written.

        They go through the template as placeholders, so that every special token in what it renders is its own. Between
        these the placeholders are replaced by what they stand for, and encoded without looking for special tokens.
        """
        mark = _unused_character(chain((self.chat_template,), (message["content"] for message in messages)))
        written: list[str] = []

        def hide(match: re.Match[str]) -> str:
            written.append(match[0])
            return f"{mark}{len(written) - 1}{mark}"

        hidden = [dict(m) | {"content": self._any_special.sub(hide, m["content"])} for m in messages]
        prompt = self._rendered(hidden)
        placeholder = re.compile(f"{mark}([0-9]+){mark}")
        tokens, start = [], 0
        for match in chain(self._any_special.finditer(prompt), (None,)):
            between = prompt[start : match.start() if match else None]
            plain = placeholder.sub(lambda found: written[int(found[1])], between)
            tokens += _ids(self._plain, plain)
            if match:
                tokens.append(self._special[match[0].strip()])
                start = match.end()
        return tokens

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return self._render(messages)
        except ValueError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, with the tokenizer's own opening token unless told otherwise."""
        return _ids(self._tokenizer, prompt, special_tokens=special_tokens)

    def piece(self, token: int) -> str:
        """A token's own text; U+FFFD where it is a part of a character."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

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


def _ids(tokenizer: Tokenizer, text: str, *, special_tokens: bool = False) -> list[int]:
    """The text's tokens, as a batch of one: `encode` holds Python's lock all the time, and takes longer for offsets."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
    return list(encoding.ids)


def _pattern(token: AddedToken) -> str:
    """What the tokenizer takes for this token: some swallow the white space beside them."""
    return (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


def _unused_character(texts: Iterable[str]) -> str:
    """A character of Unicode's private use area that is in none of the texts. Raises InvalidRequest where all are."""
    used = set().union(*texts)
    for code in range(0xE000, 0xF900):
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequest("the messages hold special tokens and every character for private use", param="messages")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
