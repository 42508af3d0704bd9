"""The tiny models, once a session where a test does not change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from local_engine.text import Text
from tests.tiny_models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer, write

WriteModel = Callable[..., Path]


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of the tiny models."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def text(tokenizer: Tokenizer) -> Text:
    """The tokenizer with a template that needs no transformers."""
    return Text(
        tokenizer,
        lambda shown: "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in shown.messages) + "<|assistant|>",
        chat_template=CHAT_TEMPLATE,
        bos_token=None,
        eos_token="<|end|>",
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """Writes a random float32 model of a kind into a directory of its own."""

    def written(
        kind: str = "llama", *, window: int = 256, chat_template: str | None = CHAT_TEMPLATE, **changes: Any
    ) -> Path:
        model = tiny_model(kind, window=window, **changes)
        return write(model, tmp_path_factory.mktemp(kind), chat_template=chat_template)

    return written


@pytest.fixture(scope="session")
def llama(write_model: WriteModel) -> Path:
    """The directory of a random Llama with a window of 256."""
    return write_model("llama")
