"""Owns structured output: a schema, pattern or grammar becomes the set of tokens that may come next; refuses tensors.

llguidance does the work (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import orjson
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from local_engine.errors import InvalidRequest, Overloaded

GrammarKind = Literal["json_schema", "regex", "choice", "lark"]

MAX_CHARACTERS = 256 * 1024

STACK_BYTES = 512 * 2**20
"""For compiling, which recurses as deep as definitions refer to each other: the deepest that MAX_CHARACTERS allow took
115 MiB. Only what is used takes memory; an ordinary stack of 8 MiB overflowed, and with it the process ended."""

MOST_COMPILING = 2
"""Structures that are compiled at once: one may take minutes and cannot be stopped, and there is other work."""

TOKEN_SECONDS = 1.0
"""Of a processor's time for a token, which everybody waits for. Usual are 0.0001."""

_LIMITS = LLParserLimits(verbose_errors=False)
"""llguidance's own, and no part of a grammar in its messages."""

_NOTHING_FITS = "NoExtensionBias <non-verbose/>"
"""llguidance's words where no token may come."""

_ANY_OBJECT: dict[str, object] = {"type": "object"}
_LONGEST_REASON = 300
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_EXCERPT = re.compile(r"\s*(\d+ \||\^+$)")
"""A line of the grammar with its number, or what points into it."""
_WORD = re.compile(r"\w+")
_SCHEMA_WORDS = frozenset(
    {"type", "properties", "required", "items", "enum", "const", "pattern", "format", "minimum", "maximum", "anyof"}
    | {"minlength", "maxlength", "minitems", "maxitems", "additionalproperties", "allof", "oneof", "not", "ref", "defs"}
    | {"object", "array", "string", "number", "integer", "boolean", "null", "start"}
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer must look like: a JSON Schema or a list of texts as JSON, or a pattern or grammar as text."""

    kind: GrammarKind
    text: str
    param: str

    @classmethod
    def json_object(cls) -> Wanted:
        """Any JSON object."""
        return cls("json_schema", orjson.dumps(_ANY_OBJECT).decode(), "response_format")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a structure may take, in seconds: to be compiled, until that begins, and, of a processor's time, for a
    token, which everybody waits for."""

    compile_seconds: float = 10.0
    place_seconds: float = 1.0
    token_seconds: float = TOKEN_SECONDS


class _Slow(Exception):
    """Of a structure; the text quotes nothing of it."""


class Grammar:
    """A compiled grammar. Invariant: some token may come first."""

    def __init__(self, beginning: LLMatcher, token_seconds: float) -> None:
        self._beginning = beginning
        self._token_seconds = token_seconds

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer, in microseconds."""
        return Matcher(self._beginning.deep_copy(), self._token_seconds)


class Matcher:
    """How far one answer has come in its grammar. Used by the engine's thread only."""

    def __init__(self, matcher: LLMatcher, token_seconds: float = TOKEN_SECONDS) -> None:
        self._matcher = matcher
        self._token_seconds = token_seconds

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> bytes:
        """A bit for each token, the lowest bit of the first byte for token 0. Raises ValueError where it fails."""
        started = time.thread_time()
        bits: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError("the grammar failed")
        if time.thread_time() - started > self._token_seconds:
            raise ValueError("the grammar takes too long")
        return bits

    def allowed_along(self, tokens: Sequence[int]) -> list[bytes]:
        """What may come next, and what after each of these tokens; where one does not fit, or ends the answer, it does
        not matter what may come behind it, and what may come at its place is repeated. Raises ValueError as
        `allowed`."""
        masks = [self.allowed()]
        if not tokens:
            return masks
        ahead = Matcher(self._matcher.deep_copy(), self._token_seconds)
        for token in tokens:
            if not ahead.complete and ahead._matcher.try_consume_tokens([token]) and not ahead.complete:
                masks.append(ahead.allowed())
            else:
                return masks + [masks[-1]] * (len(tokens) + 1 - len(masks))
        return masks

    def add(self, token: int) -> None:
        """The answer goes on with this token. Raises ValueError where the grammar does not allow it."""
        if not self._matcher.consume_token(token):
            raise ValueError("the token does not fit the grammar")


class Grammars:
    """Compiles grammars for one model's tokenizer. Any thread may call."""

    def __init__(
        self, tokenizer_json: str, vocabulary: int, end_tokens: frozenset[int], patience: Patience | None = None
    ) -> None:
        """`vocabulary`: how many logits the model gives, which may be more than the tokenizer has tokens."""
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocabulary, eos_token=sorted(end_tokens))
        self._patience = patience or Patience()
        self._starting = threading.Lock()
        self._places = threading.BoundedSemaphore(MOST_COMPILING)

    def compiled(self, wanted: Wanted) -> Grammar:
        """Raises InvalidRequest with llguidance's reason, Overloaded where others take long."""
        if len(wanted.text) > MAX_CHARACTERS:
            raise InvalidRequest(f"{wanted.param} is longer than {MAX_CHARACTERS} characters", param=wanted.param)
        try:
            beginning = self._beginning(_source(wanted))
            problem = str(beginning.get_error()).replace(_NOTHING_FITS, "nothing fits it")
        except _Slow as error:
            raise InvalidRequest(f"{wanted.param} cannot be followed: {error}", param=wanted.param) from None
        except (TypeError, ValueError) as error:  # the one where JSON is nested too deeply
            problem = str(error)
        if problem:
            told = " ".join(" ".join(line for line in problem.splitlines() if not _EXCERPT.match(line)).split())
            reason = _without_words_of(wanted.text, told)[:_LONGEST_REASON]
            raise InvalidRequest(f"{wanted.param} cannot be followed: {reason}", param=wanted.param)
        return Grammar(beginning, self._patience.token_seconds)

    def _beginning(self, source: str) -> LLMatcher:
        """A matcher that knows what may come first, or is in error: the compiler's own, or since nothing may. Raises
        _Slow, Overloaded."""
        patience, made, slow = self._patience, list[LLMatcher](), list[float]()

        def compile() -> None:
            try:
                matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
                started = time.thread_time()
                if not matcher.is_error():
                    matcher.compute_bitmask()
                if time.thread_time() - started > patience.token_seconds:
                    slow.append(patience.token_seconds)
                made.append(matcher)
            finally:
                self._places.release()

        if not self._places.acquire(timeout=patience.place_seconds):
            raise Overloaded("other structures take long to compile", retry_after=patience.compile_seconds)
        with self._starting:  # the size is the process's, for threads that start
            before = threading.stack_size(STACK_BYTES)
            try:
                thread = threading.Thread(target=compile, name="grammar", daemon=True)
                thread.start()
            except RuntimeError:  # no memory for a thread, say
                self._places.release()
                raise
            finally:
                threading.stack_size(before)
        thread.join(patience.compile_seconds)
        if not made:
            slow.append(patience.compile_seconds)
        if slow:
            raise _Slow(f"it takes longer than {slow[0]:g} s")
        return made[0]


def compact(schema: str) -> str:
    """The schema with the request that JSON be written as Python does, without other white space: JSON allows that
    without end between its tokens, and a small model may choose nothing else. One that says how is left as it is."""
    parsed = orjson.loads(schema)
    return orjson.dumps({"x-guidance": _COMPACT} | parsed).decode() if isinstance(parsed, dict) else schema


def _without_words_of(text: str, problem: str) -> str:
    """The compiler's sentence without what the caller wrote; the vocabulary of JSON Schema may stay."""
    own = {word for word in _WORD.findall(text) if word.lower() not in _SCHEMA_WORDS}
    return _WORD.sub(lambda found: "…" if found[0] in own else found[0], problem)


def _source(wanted: Wanted) -> str:
    match wanted.kind:
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(compact(wanted.text)))
        case "regex":
            return str(LLMatcher.grammar_from_regex(wanted.text))
        case "choice":
            choices = orjson.loads(wanted.text)
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices))))
        case "lark":
            return str(LLMatcher.grammar_from_lark(wanted.text))
