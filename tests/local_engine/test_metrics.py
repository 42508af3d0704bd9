"""What a scrape of the engine says, and who may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from local_engine.cli import TOKEN, app
from local_engine.config import Settings
from local_engine.edge import OPEN_PATHS
from local_engine.engine import Engine
from local_engine.loading import load
from local_engine.metrics import METRICS, table
from local_engine.pace import STEP_BUCKETS, StepTimes
from local_engine.server import create_app
from tests.local_engine.test_server import CHAT, HELLO, serving

README = Path(__file__).parents[2] / "local_engine" / "README.md"


def values(text: str) -> dict[str, float]:
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples if not s.labels}


def test_a_scrape_counts_what_was_done(llama: Path, tmp_path: Path) -> None:
    async def conversation() -> tuple[str, dict[str, Any]]:
        async with serving(lambda: load(Settings(model=str(llama))), tmp_path / "s") as (client, _):
            for _ in range(2):
                assert (await client.post(CHAT, json=HELLO)).status_code == 200
            scrape = await client.get("/metrics")
            assert scrape.headers["content-type"].startswith("text/plain")
            return scrape.text, (await client.get("/load")).json()

    text, load_ = asyncio.run(conversation())
    found = values(text)
    assert found["hybridgate_engine_ready"] == 1
    assert found["hybridgate_engine_finished_total"] == 2
    assert found["hybridgate_engine_decode_tokens_total"] == 2 * 5  # the first of six comes from the prefill
    assert found["hybridgate_engine_step_seconds_count"] == load_["steps_total"] > 0
    assert found["hybridgate_engine_batch_sequences_total"] == load_["steps_total"]
    assert found["hybridgate_engine_kv_blocks"] == load_["total_blocks"]
    assert found["hybridgate_engine_step_seconds_sum"] > 0
    assert found["process_resident_memory_bytes"] > 0
    assert "the quick brown fox" not in text


def exported(text: str) -> Iterator[str]:
    for family in text_string_to_metric_families(text):
        if family.name.startswith("hybridgate_"):
            yield family.name + ("_total" if family.type == "counter" else "")


def test_what_is_described_is_what_is_exported(llama: Path, tmp_path: Path) -> None:
    async def conversation() -> str:
        async with serving(lambda: load(Settings(model=str(llama))), tmp_path / "s") as (client, _):
            return (await client.get("/metrics")).text

    assert set(exported(asyncio.run(conversation()))) == {metric.name for metric in METRICS}


def test_while_the_model_loads_a_scrape_says_that_it_is_not_ready(tmp_path: Path) -> None:
    engine = Engine(lambda: pytest.fail("not started"))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine, Settings(model="demo")))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.get("/metrics")

    scrape = asyncio.run(ask())
    assert scrape.status_code == 200
    assert list(exported(scrape.text)) == ["hybridgate_engine_ready"]
    assert values(scrape.text)["hybridgate_engine_ready"] == 0


def test_the_readme_has_the_table_of_metrics() -> None:
    assert table() in README.read_text()


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0005, 0), (0.001, 0), (0.0011, 1), (5.0, 14), (60.0, 15)])
def test_a_step_is_counted_in_the_first_bucket_that_holds_it(seconds: float, bucket: int) -> None:
    times = StepTimes()
    times.record(seconds)
    assert times.counts.index(1) == bucket
    assert len(times.counts) == len(STEP_BUCKETS) + 1


@asynccontextmanager
async def guarded(tmp_path: Path, llama: Path) -> Any:
    """A server that wants a token."""
    loaded = asyncio.Event()
    settings = Settings(model=str(llama), default_max_tokens=2)
    engine = Engine(lambda: load(settings), on_change=loaded.set)
    engine.start()
    app_ = create_app(engine, settings, token="a-token")
    server = uvicorn.Server(uvicorn.Config(app_, uds=str(tmp_path / "s"), lifespan="off", ws="none", log_config=None))
    task = asyncio.create_task(server._serve())
    await loaded.wait()
    transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
        yield client
    server.should_exit = True
    await task
    assert await asyncio.to_thread(engine.stop)


@pytest.mark.parametrize("sent", [None, "Bearer another", "Bearer a-token2", "bearer", "Basic a-token", "a-token", ""])
def test_who_has_no_token_gets_health_and_metrics_only(tmp_path: Path, llama: Path, sent: str | None) -> None:
    async def conversation() -> list[tuple[str, int, str]]:
        headers = {} if sent is None else {"authorization": sent}
        seen = []
        async with guarded(tmp_path, llama) as client:
            for path in ("/health", "/metrics", "/load", "/tokenizer", "/v1/models", "/none"):
                response = await client.get(path, headers=headers)
                seen.append((path, response.status_code, response.text))
            refused = await client.post(CHAT, json=HELLO, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["x-request-id"]
            assert refused.json()["error"]["code"] == "invalid_api_key"
        return seen

    for path, status, text in asyncio.run(conversation()):
        assert status == (200 if path in OPEN_PATHS else 401), path
        assert "a-token" not in text


def test_who_has_the_token_is_served(tmp_path: Path, llama: Path) -> None:
    async def conversation() -> str:
        async with guarded(tmp_path, llama) as http:
            client = openai.AsyncOpenAI(base_url="http://engine/v1", api_key="a-token", http_client=http)
            hello: Any = HELLO["messages"]
            answer = await client.chat.completions.create(model=str(llama), messages=hello)
            return str(answer.choices[0].finish_reason)

    assert asyncio.run(conversation()) == "length"


@pytest.mark.parametrize("token", ["has a space", "ünïcode", "line\nbreak"])
def test_a_token_that_no_header_can_carry_ends_the_start(token: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", "1"], env={TOKEN: token})
    assert result.exit_code == 2
    assert "HYBRIDGATE_ENGINE_TOKEN must be printable ASCII" in result.output
    assert token not in result.output
