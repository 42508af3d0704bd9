"""Owns /v1/embeddings' body and answer, and what an encoder is to the server; refuses torch and HTTP."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from local_engine.conversation import Body
from local_engine.errors import ContextLengthExceeded
from local_engine.protocol import parse_object, validated

MAX_INPUTS = 2048
"""As many as OpenAI takes."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """One vector a text, in order, each of length 1; and how many tokens were computed."""

    vectors: list[list[float]]
    tokens: int


class TooLong(ContextLengthExceeded):
    """Text number `index` has so many `tokens`, more than the `window`."""

    def __init__(self, index: int, tokens: int, window: int) -> None:
        super().__init__(
            f"input[{index}] has {tokens} tokens, the embedding model's window holds {window}; split the text",
            param="input",
        )


class Embedder(Protocol):
    """An encoder model."""

    name: str
    dimensions: int

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """The texts' vectors. Raises TooLong."""


def _input(value: object) -> object:
    """A text or a list of texts, none of them empty."""
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(type(item) is int or isinstance(item, list) for item in texts):
        raise PydanticCustomError(
            "tokens",
            "token ids of another model's tokenizer mean nothing here: send text "
            "(in LangChain: check_embedding_ctx_length=False)",
        )
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) and item for item in texts):
        raise PydanticCustomError("input", "must be a text or a list of texts, none of them empty")
    if len(texts) > MAX_INPUTS:
        raise PydanticCustomError("input", "has more than {most} texts", {"most": MAX_INPUTS})
    return tuple(texts)


class EmbeddingRequest(Body):
    """A parsed body."""

    input: Annotated[tuple[str, ...], BeforeValidator(_input)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


def parse_embeddings(body: bytes) -> EmbeddingRequest:
    """A body of /v1/embeddings. Raises InvalidRequest."""
    return validated(EmbeddingRequest, parse_object(body))


def answer(wanted: EmbeddingRequest, model: str, found: Vectors) -> dict[str, Any]:
    """OpenAI's answer. Base64 is of little-endian 32-bit floats, as OpenAI's clients read it."""
    coded: list[Any] = found.vectors
    if wanted.encoding_format == "base64":
        coded = [b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() for vector in found.vectors]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(coded)],
        "model": model,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }
