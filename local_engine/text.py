"""Owns the way between text and tokens: chat template, encoding, decoding, stop strings; refuses tensors.

What a message says is text: a special token that is written in it, such as one that ends a turn, does not act as one.
The same goes for tools, and for the arguments and results of their calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream

from local_engine.calls import Family, fitting_id
from local_engine.conversation import Conversation
from local_engine.errors import InvalidRequest

NO_CHARACTER = "\ufffd"
"""What bytes are shown as that are none."""

CHARACTER_TOKENS = 3
"""Tokens that a character can lack its end with, in UTF-8."""

MOST_HELD = 16
"""Tokens without a text, after which they are let go."""

PROMPT_TAIL = 8
"""Prompt tokens that the decoder sees first, so that a leading space of the answer is kept where it belongs."""


def _byte_of() -> dict[str, int]:
    """Byte-level tokenizers write a byte as the letter of that number where it can be seen, else as one from 256 on, in
    order (GPT-2's encoder.py, `bytes_to_unicode`)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF = _byte_of()


@dataclass(frozen=True, slots=True)
class Shown:
    """What a chat template reads: messages and tools as transformers has them, and how the prompt ends."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    opens: bool = True
    continues: bool = False

    def texts(self) -> Iterator[str]:
        """Every string in messages and tools."""
        return chain(_strings(self.messages), _strings(self.tools))


class Text:
    """One model's tokenizer and chat template. Invariant: nothing changes after construction, so any thread may call.

    `render` turns a conversation into the prompt's text; it raises ValueError (jinja2's and transformers' errors are
    translated by whoever made it) with a message that holds nothing of the conversation. `family` is the form of tool
    calls that the template teaches; None where it teaches none that is known.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        render: Callable[[Shown], str],
        *,
        chat_template: str,
        bos_token: str | None,
        eos_token: str | None,
        eos_token_id: int | None,
        family: Family | None = None,
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
        self._anchor = tuple(_ids(tokenizer, "a"))
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_id = eos_token_id
        self.family = family
        # Ids may have holes, so this is not the number of entries.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """Tokens of the rendered conversation. Raises InvalidRequest.

        The special tokens are those that the template writes; in messages and tools they are plain text.
        """
        if conversation.uses_tools and self.family is None:
            raise InvalidRequest(
                "tools and their calls: this model's chat template knows none, or writes calls in a form that is not "
                "read here; leave `tools` and tool messages out, or name another model",
                param="tools" if conversation.tools else "messages",
            )
        shown = Shown(
            [self._fitting(message.shown()) for message in conversation.messages],
            [tool.shown for tool in conversation.tools],
            conversation.opens,
            conversation.continues,
        )
        if any(self._any_special.search(text) for text in shown.texts()):
            return self._encode_quoting(shown)
        # The template writes the special tokens itself.
        return _ids(self._tokenizer, self._rendered(shown))

    def _fitting(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with ids of calls that the template takes: those of another model's answer may be longer."""
        for call in message.get("tool_calls", ()):
            call["id"] = fitting_id(call["id"], self.family)
        if "tool_call_id" in message:
            message["tool_call_id"] = fitting_id(message["tool_call_id"], self.family)
        return message

    def _encode_quoting(self, shown: Shown) -> list[int]:
        """As `encode_chat`, for conversations in which special tokens are written.

        They go through the template as placeholders, so that every special token in what it renders is its own. Between
        these the placeholders are replaced by what they stand for, and encoded without looking for special tokens.
        """
        mark = _unused_character(chain((self.chat_template,), shown.texts()))
        written: list[str] = []

        def hide(match: re.Match[str]) -> str:
            written.append(match[0])
            return f"{mark}{len(written) - 1}{mark}"

        def hidden(text: str) -> str:
            return self._any_special.sub(hide, text)

        prompt = self._rendered(
            replace(shown, messages=_mapped(shown.messages, hidden), tools=_mapped(shown.tools, hidden))
        )
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

    def _rendered(self, shown: Shown) -> str:
        try:
            return self._render(shown)
        except ValueError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def special_token(self, text: str) -> int | None:
        """The id of the special token that is written so; None where none is."""
        return self._special.get(text)

    def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, with the tokenizer's own opening token unless told otherwise."""
        return _ids(self._tokenizer, prompt, special_tokens=special_tokens)

    def piece(self, token: int) -> bytes:
        """A token's own text in UTF-8, with the space that it may begin with; the bytes where it is a part of a
        character."""
        before = self._tokenizer.decode(self._anchor, skip_special_tokens=False) if self._anchor else ""
        text = str(self._tokenizer.decode([*self._anchor, token], skip_special_tokens=False)).removeprefix(before)
        if NO_CHARACTER not in text:
            return text.encode()
        written = str(self._tokenizer.id_to_token(token) or "")
        if spelled := re.fullmatch("<0x([0-9A-F]{2})>", written):
            return bytes([int(spelled[1], 16)])
        if all(letter in BYTE_OF for letter in written):
            return bytes(BYTE_OF[letter] for letter in written)
        return text.encode()

    def decoder(self, prompt: Sequence[int], stop: Sequence[str], shown: frozenset[str] = frozenset()) -> AnswerText:
        """The text of an answer to this prompt, token by token, with those special tokens that are `shown`."""
        tokens = {self._special[content]: content for content in shown if content in self._special}
        return AnswerText(self._tokenizer, prompt[-PROMPT_TAIL:], stop, tokens, self._anchor)

    def tokenizer_json(self) -> str:
        """The tokenizer as tokenizer.json."""
        return str(self._tokenizer.to_str())


class AnswerText:
    """An answer's text as it grows. Invariant: what `add` and `flush` gave never holds a stop string or part of one.

    Incomplete UTF-8 and a possible beginning of a stop string are held back until they are decided.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int],
        stop: Sequence[str],
        shown: Mapping[int, str] | None = None,
        anchor: Sequence[int] = (),
    ) -> None:
        """`shown`: special tokens that are not left out, each with what it shows. `anchor`: tokens of a letter, behind
        which a text may begin anew without the loss of a space."""
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._anchor = list(anchor)
        # A stream that begins within a character would say it again.
        within = self._decoded(prompt_tail).endswith(NO_CHARACTER)
        self._stream = DecodeStream(ids=self._anchor if within else list(prompt_tail), skip_special_tokens=True)
        self._held: list[int] = []
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.found

    def add(self, token: int) -> str:
        """Text that may be shown now, after one more token."""
        if (mark := self._shown.get(token)) is not None:
            rest = self._decoded_anew()
            self._restart()
            return self._stop.add(rest + mark)
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # noqa: BLE001 - tokenizers raises no other where these bytes unmake characters that were shown
            text = self._decoded_anew()
            self._restart()
        if text is None and len(self._held) < MOST_HELD:
            return ""
        if text is None:
            text = self._let_go()
        else:
            self._held.clear()
        return self._stop.add(text)

    def flush(self) -> str:
        """What was held back, once no more tokens come. A cut character becomes U+FFFD, as in any decode."""
        rest = self._decoded_anew()
        self._held.clear()
        return self._stop.add(rest) + self._stop.flush()

    def _let_go(self) -> str:
        """The text of the held tokens, which show nothing or are no characters, but for the last ones, which may begin
        one. They would be decoded again with each token that comes."""
        whole, held = self._decoded_anew(), self._held
        for kept in range(CHARACTER_TOKENS, len(held)):
            certain = self._decoded(held[:-kept])
            if certain + self._decoded(held[-kept:]) == whole:
                break
        return certain + self._restart(held[-kept:])

    def _restart(self, tokens: Sequence[int] = ()) -> str:
        """Decode afresh from these tokens on: their text, as far as it is certain."""
        self._held = []
        self._stream = DecodeStream(ids=self._anchor, skip_special_tokens=True)
        said = ""
        for token in tokens:
            self._held.append(token)
            if text := self._stream.step(self._tokenizer, token):
                said += text
                self._held.clear()
        return said

    def _decoded_anew(self) -> str:
        """The held tokens' text, with the space that it may begin with."""
        if not self._held:
            return ""
        before = self._decoded(self._anchor)
        return self._decoded([*self._anchor, *self._held]).removeprefix(before)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


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


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON-like value with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inner, change) for inner in value]
    return value


def _ids(tokenizer: Tokenizer, text: str, *, special_tokens: bool = False) -> list[int]:
    """The text's tokens, as a batch of one: `encode` holds Python's lock all the time, and takes longer for offsets."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
    return list(encoding.ids)


def _pattern(token: AddedToken) -> str:
    """What the tokenizer takes for this token: some swallow the white space beside them."""
    # Only where white space begins: else each of a thousand spaces would be tried as a beginning of all that follow.
    return (r"(?:(?<!\s)\s+)?" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


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
