"""Embeddings: against transformers' own forward, one text at a time, and over HTTP with the official client."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from local_engine.config import Settings
from local_engine.encoder import BATCH_TOKENS, _batches, load_encoder
from local_engine.engine import Engine
from local_engine.errors import ConfigError, LoadError
from local_engine.loading import load
from local_engine.vectors import TooLong
from tests.local_engine.test_server import serving
from tests.tiny_models import VOCABULARY, tiny_tokenizer

TEXTS = ["the quick brown fox", "a", "the lazy dog " * 9, "the quick brown fox"]


def encoder_directory(path: Path, kind: str = "bert", files: dict[str, Any] | None = None) -> str:
    """A random encoder with a window of 64 tokens."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if kind == "bert":
        model: Any = BertModel(BertConfig(max_position_embeddings=64, **sizes))
    else:
        model = RobertaModel(RobertaConfig(max_position_embeddings=66, **sizes))
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()).save_pretrained(path)
    for name, told in (files or {}).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(orjson.dumps(told))
    return str(path)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [
        (None, lambda hidden: hidden.mean(0)),
        ("pooling_mode_mean_tokens", lambda hidden: hidden.mean(0)),
        ("pooling_mode_cls_token", lambda hidden: hidden[0]),
    ],
)
def test_a_batch_gives_what_each_text_gives_alone(tmp_path: Path, kind: str, pooling: str | None, pooled: Any) -> None:
    files = {"1_Pooling/config.json": {"word_embedding_dimension": 32, pooling: True}} if pooling else None
    source = encoder_directory(tmp_path / "m", kind, files)
    found = load_encoder(source, "tiny").embedded(TEXTS)
    reference, tokenizer = AutoModel.from_pretrained(source).eval(), tiny_tokenizer()
    assert found.tokens == sum(len(tokenizer.encode(text).ids) for text in TEXTS)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        with torch.inference_mode():
            hidden = reference(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(pooled(hidden), dim=0)
        assert torch.allclose(torch.tensor(vector), expected, atol=1e-5)
        assert math.isclose(sum(x * x for x in vector), 1, abs_tol=1e-5)


def test_batches_hold_every_row_once_and_not_too_much_padding() -> None:
    rows = [[0] * length for length in (5, 3_000, 1_500, 1, 4_096, 9_000, 2)]
    batches = _batches(rows)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    assert all(len(batch) == 1 or len(batch) * len(rows[batch[0]]) <= BATCH_TOKENS for batch in batches)


@pytest.mark.parametrize(("kind", "window"), [("bert", 64), ("roberta", 64)])
def test_a_text_longer_than_the_window_is_refused_with_both_numbers(tmp_path: Path, kind: str, window: int) -> None:
    encoder = load_encoder(encoder_directory(tmp_path / "m", kind), "tiny")
    long = "a" * 200
    count = len(tiny_tokenizer().encode(long).ids)
    with pytest.raises(TooLong, match=rf"input\[1\] has {count} tokens, the embedding model's window holds {window}"):
        encoder.embedded(["a", long])


def test_the_directory_may_say_a_shorter_window(tmp_path: Path) -> None:
    files = {"sentence_bert_config.json": {"max_seq_length": 4}}
    encoder = load_encoder(encoder_directory(tmp_path / "m", files=files), "tiny")
    with pytest.raises(TooLong, match="holds 4"):
        encoder.embedded(["the lazy dog " * 9])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens"),
        ({"config.json": {"model_type": "no-such"}}, "name an encoder"),
    ],
)
def test_what_would_give_other_vectors_is_not_loaded(tmp_path: Path, files: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadError, match=says):
        load_encoder(encoder_directory(tmp_path / "m", files=files), "tiny")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"embedding_model": "demo"}, "has the name of --model"),
        ({"embedding_served_name": "e"}, "needs --embedding-model"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings(model="demo", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def settings(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    source = encoder_directory(tmp_path_factory.mktemp("encoder") / "m")
    return Settings(model=str(llama), served_name="tiny", embedding_model=source, embedding_served_name="vectors")


def test_the_official_client_gets_vectors(settings: Settings, tmp_path: Path) -> None:
    async def conversation() -> tuple[Any, Any, Any]:
        async with serving(lambda: load(settings), tmp_path / "s", settings) as (http, _):
            client = openai.AsyncOpenAI(base_url="http://engine/v1", api_key="-", http_client=http)
            models = [model.id async for model in client.models.list()]
            packed = await client.embeddings.create(model="vectors", input=TEXTS)
            plain = await http.post("/v1/embeddings", json={"input": TEXTS[0], "encoding_format": "float"})
            return models, packed, plain.json()

    models, packed, plain = asyncio.run(conversation())
    assert models == ["tiny", "vectors"]
    assert [one.index for one in packed.data] == [0, 1, 2, 3]
    assert packed.data[0].embedding == packed.data[3].embedding != packed.data[1].embedding
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    assert plain["data"][0]["embedding"] == pytest.approx(packed.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"input": "a", "model": "tiny"}, 404, "embeddings are vectors's only"),
        ({"input": "a", "dimensions": 31}, 400, "this model gives 32"),
        ({"input": []}, 400, "none of them empty"),
        ({"input": ["a", ""]}, 400, "none of them empty"),
        ({"input": [1, 2]}, 400, "check_embedding_ctx_length=False"),
        ({"input": [[1, 2]]}, 400, "check_embedding_ctx_length=False"),
        ({"input": ["a"] * 2049}, 400, "more than 2048"),
        ({"input": "a" * 200}, 400, "the embedding model's window holds 64"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({}, 400, "input"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    settings: Settings, tmp_path: Path, body: dict[str, Any], status: int, says: str
) -> None:
    async def conversation() -> httpx.Response:
        async with serving(lambda: load(settings), tmp_path / "s", settings) as (http, _):
            return await http.post("/v1/embeddings", json=body)

    response = asyncio.run(conversation())
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_an_engine_without_an_encoder_says_how_to_get_one(llama: Path, tmp_path: Path) -> None:
    async def conversation() -> httpx.Response:
        async with serving(lambda: load(Settings(model=str(llama))), tmp_path / "s") as (http, _):
            return await http.post("/v1/embeddings", json={"input": "a"})

    response = asyncio.run(conversation())
    assert response.status_code == 404
    assert "start it with --embedding-model" in response.json()["error"]["message"]


def test_clients_that_leave_while_they_wait_keep_nobody_from_an_answer(settings: Settings, tmp_path: Path) -> None:
    async def conversation() -> None:
        async with serving(lambda: load(settings), tmp_path / "s", settings) as (http, engine):
            assert isinstance(engine, Engine)
            tasks = [asyncio.create_task(http.post("/v1/embeddings", json={"input": TEXTS * 40})) for _ in range(4)]
            await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            answered = await http.post("/v1/embeddings", json={"input": "a"})
            assert answered.status_code == 200

    asyncio.run(conversation())
