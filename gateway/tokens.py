"""How many tokens a prompt has: a bound for any tokenizer, an estimate, and exact counts by one tokenizer.

Owns the arithmetic and the exact counters. Refuses to load anything: encodings, tokenizer files, templates and the time
that a template may print come in as arguments.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import datetime
from hashlib import blake2b
from math import ceil
from typing import Any, NoReturn, Protocol

import orjson
import tiktoken
from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from gateway.marks import without_excess_marks
from gateway.types import ChatRequest, Deployment, TokenCount

# English prose in o200k has about 4.5 bytes a token, code and JSON 3 to 4.
BYTES_PER_TOKEN = 4

# More bytes a token than any prompt has that says something (the longest tokens there are hold 128 spaces): text that
# would need it to fit is not worth the seconds that counting it takes.
MOST_BYTES_PER_TOKEN = 32

# Of UTF-8, at most (UAX #15, table 4, "Maximum Expansion Factors").
MOST_GROWTH_IN_NFC = 3

# What a chat template writes around the messages: the opening of the answer and a short default system message. The
# frame of a message needs no allowance: its JSON keys, which are counted, are longer than any template's markers.
ALLOWANCE = 128

# Some templates and providers put instructions before tools: Anthropic documents up to 346 tokens.
ALLOWANCE_FOR_TOOLS = 512

# What is not text has no tokens to count. Anthropic documents about 1,600 for its largest picture, OpenAI's most models
# less, some far more: an allowance, and the provider has the last word.
TOKENS_PER_MEDIA_PART = 1_600

# What a template sees of a message.
_READ = ("role", "content", "tool_calls", "tool_call_id")

# Of a call: the templates of Mistral's models take no other, so our engine gives them a digest of what is longer.
_SHORT_ID = 9

_READ_AS_TEXT = frozenset({"base64"})  # nobody can scan it, but its bytes are counted

_TEXT_PARTS = frozenset({"text", "refusal", "input_text", "output_text"})

# OpenAI's cookbook, "How to count tokens with tiktoken": 3 frame a message, 1 is for a name, 3 prime the answer.
_FRAME = 3
_NAME = 1
_PRIMING = 3

# tiktoken's pattern engine overflows its stack on a run of a million spaces, with an exception that `except Exception`
# does not catch. Runs of 300,000 were read without; a cut adds a token or two.
_PIECE = 100_000


class TokenCounter(Protocol):
    """Counts as one served model does. Pure, so that a long prompt may be counted in a thread."""

    def count(self, chat: ChatRequest) -> int:
        """Prompt tokens, the template's included."""


def count(chat: ChatRequest, allowance: int = ALLOWANCE) -> TokenCount:
    """Bound and estimate of the prompt's tokens; nothing is tokenized.

    A byte-level BPE makes at most one token of a byte, and so does a SentencePiece BPE that falls back to bytes. The
    bound is therefore the size of the whole body as UTF-8 JSON, which is longer than its text, plus `allowance` tokens
    for the template. It does not cover tokenizers that normalize to NFKC, nor a template with a longer preamble.
    """
    text = orjson.dumps(chat.body)
    size, media = len(text), 0
    if not text.isascii():
        size = max(size, _size_in_nfc(text.decode()))
    if chat.parts:
        media_bytes, media = _media(chat.body["messages"])
        size -= media_bytes
    bound = size + allowance + media * TOKENS_PER_MEDIA_PART
    if chat.tools:
        bound += ALLOWANCE_FOR_TOOLS + _indentation(chat.body.get("tools") or chat.body.get("functions") or [])
    estimate = ceil(size / BYTES_PER_TOKEN) + media * TOKENS_PER_MEDIA_PART
    return TokenCount(bound=bound, estimate=estimate, open=bool(chat.parts - _READ_AS_TEXT))


def _size_in_nfc(text: str) -> int:
    """Bytes at most: some tokenizers (Qwen's) read NFC, which may be longer than what it is made from."""
    if without_excess_marks(text) != text:
        return MOST_GROWTH_IN_NFC * len(text.encode())
    if unicodedata.is_normalized("NFC", text):
        return 0
    return len(unicodedata.normalize("NFC", text).encode())


def undecided(prompt: TokenCount, max_tokens: int | None, deployments: Iterable[Deployment]) -> frozenset[str]:
    """Names of the tokenizers to count with: those of deployments where the bound does not fit but the prompt may."""
    return frozenset(
        deployment.tokenizer
        for deployment in deployments
        if deployment.tokenizer != "bytes"
        and deployment.tokenizer not in prompt.exact
        and not deployment.fits(prompt, max_tokens)
        and deployment.window is not None
        and deployment.output_tokens(max_tokens) < deployment.window
        and prompt.bound <= deployment.window * MOST_BYTES_PER_TOKEN
    )


def near(prompt: TokenCount, thresholds: Iterable[tuple[str, int]]) -> frozenset[str]:
    """Names of the tokenizers to count with, of pairs of a tokenizer and a number of tokens that a rule compares with:
    those where the number may be what the prompt has, at 2 to 8 bytes a token (see BYTES_PER_TOKEN)."""
    return frozenset(
        tokenizer
        for tokenizer, tokens in thresholds
        if tokenizer != "bytes" and prompt.estimate / 2 <= tokens <= min(2 * prompt.estimate, prompt.bound)
    )


def _media(messages: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Bytes and number of the parts that are not text: a picture's base64 says nothing about its tokens."""
    parts = [
        part
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part["type"] not in _TEXT_PARTS
    ]
    return sum(len(orjson.dumps(part)) for part in parts), len(parts)


def _indentation(tools: Any) -> int:
    """At most how many bytes longer the tools are where a template writes them with an indent of 4 (Llama 3 does)."""
    return 2 * (len(orjson.dumps(tools, option=orjson.OPT_INDENT_2)) - len(orjson.dumps(tools)))


class TiktokenCounter:
    """Counts as OpenAI's chat models do.

    Invariant: never below what the encoding makes of the text. Tools count as the JSON that they are, a little more
    than the unpublished form in which a model sees them.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def count(self, chat: ChatRequest) -> int:
        tokens = _PRIMING
        for message in chat.body["messages"]:
            tokens += _FRAME + (_NAME if message.get("name") else 0)
            for key, value in message.items():
                tokens += self._content(value) if key == "content" else self._tokens(value)
        return tokens + sum(self._tokens(chat.body.get(name)) for name in ("tools", "functions", "response_format"))

    def _content(self, content: str | list[dict[str, Any]] | None) -> int:
        if not isinstance(content, list):
            return self._tokens(content)
        return sum(
            self._tokens(part.get("text") or part.get("refusal"))
            if part["type"] in _TEXT_PARTS
            else TOKENS_PER_MEDIA_PART
            for part in content
        )

    def _tokens(self, value: Any) -> int:
        if not value:
            return 0
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
        if len(text) <= _PIECE:
            return len(self._encoding.encode_ordinary(text))
        pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
        return sum(len(self._encoding.encode_ordinary(piece)) for piece in pieces)


class LocalTokenizer:
    """Counts as an engine does that serves a Hugging Face model: its chat template, then its tokenizer.

    Invariant: `render` gives what `apply_chat_template(messages, tools=..., add_generation_prompt=True)` of
    transformers 5 gives for the messages as our engine reads them, on the day `now`.
    """

    def __init__(
        self, tokenizer_json: str, chat_template: str, bos_token: str | None, eos_token: str | None, now: datetime
    ) -> None:
        """Raises ValueError where the tokenizer or the template cannot be read."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError("tokenizer.json cannot be read by the tokenizers library") from error
        # A file may keep truncation or padding from training; neither counts what a model is given.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        self._plain = Tokenizer.from_str(self._tokenizer.to_str())
        self._plain.encode_special_tokens = True
        try:
            self._template = _environment(now).from_string(chat_template)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        self._id_length = _SHORT_ID if "[TOOL_CALLS]" in chat_template else None
        self._special = {
            name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None
        }

    def render(self, chat: ChatRequest) -> str:
        """The prompt as the model reads it. Raises jinja2's TemplateError where the template refuses the messages."""
        body = chat.body
        # Our engine does not show the model tools that it may not call.
        tools = None if body.get("tool_choice") == "none" else body.get("tools") or None
        opens = body.get("add_generation_prompt")
        return self._template.render(
            messages=[_as_read(message, self._id_length) for message in body["messages"]],
            tools=tools,
            documents=None,
            add_generation_prompt=not body.get("continue_final_message") if opens is None else bool(opens),
            **self._special,
        )

    def count(self, chat: ChatRequest) -> int:
        try:
            prompt = self.render(chat)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError):
            # The engine will refuse what its template refuses, and say why; here the bound stands in for a count.
            return count(chat).bound
        # The template writes the special tokens itself. Those that stand in a message are plain text to our engine, so
        # that nobody forges a turn; then all are counted as text, which can only be more.
        forged = any(token in text for text in chat.texts for token in self._special_tokens)
        tokenizer = self._plain if forged else self._tokenizer
        # The batch call lets other threads run meanwhile, the single one does not.
        return len(tokenizer.encode_batch_fast([prompt], add_special_tokens=False)[0].ids)


def _as_read(message: Mapping[str, Any], id_length: int | None) -> dict[str, Any]:
    """A message as our engine gives it to the template: `developer` is a system message, text parts are joined, the
    arguments of calls are objects, and their ids have the length that the template wants.

    transformers drops fields that are null.
    """
    read = {key: message[key] for key in _READ if message.get(key) is not None}
    if read["role"] == "developer":
        read["role"] = "system"
    if isinstance(read.get("content"), list):
        read["content"] = "".join(part.get("text") or "" for part in read["content"])
    if "tool_calls" in read:
        read["tool_calls"] = [_call_as_read(call, id_length) for call in read["tool_calls"]]
    if id_length is not None and isinstance(read.get("tool_call_id"), str):
        read["tool_call_id"] = _fitting(read["tool_call_id"], id_length)
    return read


def _call_as_read(call: Any, id_length: int | None) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    read, arguments = dict(call), call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            read["function"] = call["function"] | {"arguments": orjson.loads(arguments or "{}")}
        except orjson.JSONDecodeError:  # the engine will refuse it
            return call
    if id_length is not None and isinstance(call.get("id"), str):
        read["id"] = _fitting(call["id"], id_length)
    return read


def _fitting(call_id: str, length: int) -> str:
    if len(call_id) == length and call_id.isascii() and call_id.isalnum():
        return call_id
    return blake2b(call_id.encode()).hexdigest()[:length]


def _environment(now: datetime) -> Environment:
    """jinja2 as transformers sets it up for chat templates (transformers.utils.chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training. In a prompt it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
