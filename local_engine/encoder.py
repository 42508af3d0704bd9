"""Owns an encoder model: from a name to vectors of texts; refuses HTTP, and code that comes with a model.

A text's vector is the mean of its tokens' last hidden states, or the first token's where the model's directory says so
(`1_Pooling/config.json`, as sentence-transformers writes it), made to length 1. Texts are computed in batches of
similar length, by one thread of its own, in float32 on a CPU and in the checkpoint's precision elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from local_engine.errors import LoadError
from local_engine.vectors import TooLong, Vectors

BATCH_TOKENS = 4_096
"""Padded tokens of one forward: enough to fill a core's caches, few enough that activations stay small."""

UNTOLD_WINDOW = 512
"""Tokens, for a model whose configuration names no longest position."""

Pooling = Literal["mean", "first"]


class Encoder:
    """A model that turns texts into vectors of `dimensions` numbers."""

    def __init__(self, name: str, model: Any, tokenizer: Tokenizer, window: int, pooling: Pooling) -> None:
        self.name = name
        self.dimensions: int = model.config.hidden_size
        self._model = model
        self._tokenizer = tokenizer
        self._window = window
        self._pooling = pooling
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """The texts' vectors. Raises TooLong; one that nobody waits for any more and has not begun is left out."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.embedded, texts)

    def embedded(self, texts: Sequence[str]) -> Vectors:
        """The same, on this thread."""
        rows = [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]
        for index, row in enumerate(rows):
            if len(row) > self._window:
                raise TooLong(index, len(row), self._window)
        vectors: list[list[float]] = [[] for _ in rows]
        for batch in _batches(rows):
            for index, vector in zip(batch, self._forward([rows[index] for index in batch]), strict=True):
                vectors[index] = vector
        return Vectors(vectors, sum(map(len, rows)))

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, rows))
        device, padding = self._model.device, self._model.config.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self._pooling == "first":
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(-1).float()
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        vectors: list[list[float]] = torch.nn.functional.normalize(pooled, dim=1).tolist()
        return vectors


def load_encoder(source: str, name: str) -> Encoder:
    """Load an encoder from a directory or a Hugging Face id, and try it. Raises LoadError."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device.type == "cpu" else "auto"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        rust = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LoadError(
            f"cannot load the embedding model {source}: {reason}; name an encoder that transformers can load from "
            "safetensors: a directory, or a Hugging Face id"
        ) from error
    rust.no_padding()
    rust.no_truncation()
    window = getattr(config, "max_position_embeddings", None) or UNTOLD_WINDOW
    # RoBERTa counts positions from behind its padding token's id.
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        window -= 2
    encoder = Encoder(name, model.to(device).eval(), rust, min(window, _told_window(source, window)), _pooling(source))
    try:
        encoder.embedded(["warm"])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise LoadError(
            f"{source} gives no embeddings ({type(error).__name__}): name an encoder, as BERT is one"
        ) from error
    return encoder


def _batches(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of rows, longest first, in groups whose padded size is at most BATCH_TOKENS (or one row)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _told(source: str, name: str) -> dict[str, Any]:
    """A JSON file of the model's directory, or nothing."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    try:
        told = None if path is None else orjson.loads(Path(path).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return told if isinstance(told, dict) else {}


def _told_window(source: str, window: int) -> int:
    told = _told(source, "sentence_bert_config.json").get("max_seq_length")
    return told if isinstance(told, int) and told > 0 else window


def _pooling(source: str) -> Pooling:
    told = _told(source, "1_Pooling/config.json")
    if told.get("pooling_mode_cls_token") is True:
        return "first"
    other = [key for key, value in told.items() if value is True and key.startswith("pooling_mode")]
    if other and other != ["pooling_mode_mean_tokens"]:
        raise LoadError(f"{source} wants {', '.join(other)}: only the mean and the first token are built")
    return "mean"
