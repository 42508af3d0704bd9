"""The engine over HTTP: a real server on a Unix socket, a real (random) model."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import uvicorn
from tokenizers import Tokenizer

from local_engine.batch import Batch
from local_engine.calls import HERMES, LLAMA, MISTRAL, Family
from local_engine.choosing import Runner
from local_engine.config import Limits, Settings, limits
from local_engine.engine import Engine, Model
from local_engine.errors import LoadError
from local_engine.loading import load
from local_engine.report import State
from local_engine.sequence import Likelihood, Pick
from local_engine.server import MAX_BODY_BYTES, create_app
from local_engine.text import Text
from tests.tiny_models import END

SETTINGS = Settings(model="tiny", default_max_tokens=6)
HELLO = {"messages": [{"role": "user", "content": "the quick brown fox"}], "temperature": 0}
CHAT = "/v1/chat/completions"


class GatedRunner:
    """Each forward waits for one release, so that a test decides when a step happens."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.gate = threading.Semaphore(0)
        self.forwards = 0

    def forward(self, batch: Batch) -> Any:
        self.forwards += 1
        self.gate.acquire()
        return self._runner.forward(batch)

    def sample(self, logits: Any, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        return self._runner.sample(logits, rows, picks)

    def likelihoods(
        self, logits: Any, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        return self._runner.likelihoods(logits, rows, tokens, tops)


@pytest.fixture(scope="module")
def tiny(llama: Path) -> Model:
    return load(Settings(model=str(llama)))


@asynccontextmanager
async def serving(
    load_model: Callable[[], Model], socket: Path, settings: Settings = SETTINGS, *, wait: bool = True
) -> AsyncIterator[tuple[httpx.AsyncClient, Engine]]:
    """A server with this model, a client of it, and the engine inside."""
    loaded = asyncio.Event()
    engine = Engine(load_model, on_change=loaded.set)
    engine.start()
    config = uvicorn.Config(
        create_app(engine, settings, clock=lambda: 1234.5),
        uds=str(socket),
        lifespan="off",
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    if wait:
        await loaded.wait()
    while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0.001)
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
        try:
            yield client, engine
        finally:
            engine.abort_all()
    server.should_exit = True
    await task
    assert await asyncio.to_thread(engine.stop)


Talk = Callable[[httpx.AsyncClient, Engine], Awaitable[Any]]


@pytest.fixture
def talk(tiny: Model, tmp_path: Path) -> Callable[[Talk], Any]:
    """Runs a conversation with a server and gives back what it returns."""

    def run(conversation: Talk) -> Any:
        async def whole() -> Any:
            async with serving(lambda: tiny, tmp_path / "s") as (client, engine):
                return await conversation(client, engine)

        return asyncio.run(whole())

    return run


def chunks(body: str) -> list[Any]:
    return [orjson.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]


def content(body: str) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(body) if chunk["choices"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on the engine's thread
            await asyncio.sleep(0.001)


def test_a_stream_says_the_same_as_a_plain_answer(talk: Callable[[Talk], Any]) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> tuple[httpx.Response, httpx.Response]:
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        return await client.post(CHAT, json=HELLO), await client.post(CHAT, json=HELLO | asked)

    plain, stream = talk(conversation)
    answer = plain.json()
    assert answer["choices"][0]["message"]["content"] == content(stream.text) != ""
    assert answer["usage"] == chunks(stream.text)[-1]["usage"]
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["created"] == 1234
    assert stream.text.endswith("data: [DONE]\n\n")
    assert plain.headers["content-length"] == str(len(plain.content))


def test_the_official_client_is_served_plain_streaming_and_many_at_once(talk: Callable[[Talk], Any]) -> None:
    async def conversation(http: httpx.AsyncClient, _: Engine) -> None:
        client = openai.AsyncOpenAI(base_url="http://engine/v1", api_key="none", http_client=http, max_retries=0)
        fox: Any = [{"role": "user", "content": "fox"}]

        async def ask(seed: int) -> str | None:
            made = await client.chat.completions.create(model="tiny", messages=fox, seed=seed, max_tokens=8)
            return made.choices[0].message.content

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(seed % 10)) for seed in range(30)]
        answers = [task.result() for task in tasks]
        assert answers[:10] == answers[10:20] == answers[20:]
        assert len(set(answers)) > 5
        stream = await client.chat.completions.create(
            model="tiny", messages=fox, seed=3, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        pieces = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in pieces if c.choices) == answers[3]
        assert pieces[-1].usage is not None
        completion = await client.completions.create(model="tiny", prompt="the fox", max_tokens=3, temperature=0)
        assert completion.choices[0].finish_reason == "length"
        assert [each.id async for each in client.models.list()] == ["tiny"]

    talk(conversation)


def test_sixteen_streams_all_progress_together(tiny: Model, tmp_path: Path) -> None:
    """After as many steps as give every stream a token, none is left behind: the budget takes all prompts at once."""
    runner = GatedRunner(tiny.runner)

    async def run() -> None:
        async with serving(lambda: replace(tiny, runner=runner), tmp_path / "s") as (client, engine):
            asked = HELLO | {"max_tokens": 40, "stream": True}
            tasks = [asyncio.create_task(client.post(CHAT, json=asked)) for _ in range(16)]
            await until(lambda: (engine.scheduler.load().waiting + engine.scheduler.load().running) == 16)
            generated = {sequence.id: sequence for sequence in [g.sequence for g in engine._generations.values()]}
            runner.gate.release(10)
            await until(lambda: runner.forwards >= 11)
            counts = {sequence.generated for sequence in generated.values()}
            assert min(counts) >= 7
            runner.gate.release(1000)
            assert len({content((await task).text) for task in tasks}) == 1

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_sequence(tiny: Model, tmp_path: Path, stream: bool) -> None:
    runner = GatedRunner(tiny.runner)

    async def run() -> None:
        async with serving(lambda: replace(tiny, runner=runner), tmp_path / "s") as (client, engine):
            task = asyncio.create_task(client.post(CHAT, json=HELLO | {"max_tokens": 100, "stream": stream}))
            runner.gate.release(3)
            await until(lambda: runner.forwards == 4)
            task.cancel()
            await until(lambda: engine.totals.aborted == 1)
            load = engine.scheduler.load()
            assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)
            runner.gate.release(100)
            await until(lambda: engine.totals.steps == 4)
            answer = await client.post(CHAT, json=HELLO)
            assert answer.status_code == 200
            # 4 until the abort, of which one was in flight; then 6 of the next request.
            assert runner.forwards == 10

    asyncio.run(run())


def test_draining_ends_a_stream_with_an_error_event(tiny: Model, tmp_path: Path) -> None:
    runner = GatedRunner(tiny.runner)

    async def run() -> str:
        async with serving(lambda: replace(tiny, runner=runner), tmp_path / "s") as (client, engine):
            task = asyncio.create_task(client.post(CHAT, json=HELLO | {"max_tokens": 100, "stream": True}))
            runner.gate.release(10)
            await until(lambda: runner.forwards == 11)
            engine.drain()
            refused = await client.post(CHAT, json=HELLO)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
            engine.abort_all()
            runner.gate.release(10)
            return (await task).text

    body = asyncio.run(run())
    assert chunks(body)[-1]["error"]["code"] == "not_ready"
    assert "[DONE]" not in body


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        (b"{", 400, "invalid_request", "not JSON"),
        (b"{}", 400, "invalid_request", "messages: Field required"),
        ({"model": "other"}, 404, "model_not_found", "serves tiny only"),
        ({"tools": [{"type": "function"}]}, 400, "invalid_request", "tools[0].function: Field required"),
        ({"logit_bias": {"100000": 1}}, 400, "invalid_request", "logit_bias: token ids must be below"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "xyzzy"}}}},
            400,
            "invalid_request",
            "response_format cannot be followed",
        ),
        ({"guided_regex": "(xyzzy"}, 400, "invalid_request", "guided_regex cannot be followed"),
        ({"max_tokens": 250}, 400, "context_length_exceeded", "max_tokens is 250, together more than the 256"),
        (
            {"messages": [{"role": "user", "content": "xyzzy " * 200}]},
            400,
            "context_length_exceeded",
            "tokens, the model's context window holds 256",
        ),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, 400, "invalid_request", "no such word"),
    ],
)
def test_a_wrong_body_is_a_clear_error_and_the_next_request_is_unharmed(
    talk: Callable[[Talk], Any], body: bytes | dict[str, object], status: int, code: str, said: str
) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> tuple[httpx.Response, httpx.Response]:
        sent = body if isinstance(body, bytes) else orjson.dumps(HELLO | body)
        return await client.post(CHAT, content=sent), await client.post(CHAT, json=HELLO)

    refused, served = talk(conversation)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert said in error["message"]
    assert "xyzzy" not in refused.text
    assert served.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", "/load", 405, "method_not_allowed"),
    ],
)
def test_unknown_paths_and_methods_have_openais_error_shape(
    talk: Callable[[Talk], Any], method: str, path: str, status: int, code: str
) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> httpx.Response:
        return await client.request(method, path)

    response = talk(conversation)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


def test_a_body_above_the_limit_is_refused_before_it_is_read(talk: Callable[[Talk], Any]) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> httpx.Response:
        async def endless() -> AsyncIterator[bytes]:
            for _ in range(MAX_BODY_BYTES // 2**20 + 1):
                yield b" " * 2**20

        return await client.post(CHAT, content=endless())

    response = talk(conversation)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_announced_above_the_limit_is_refused_before_any_of_it_comes(tiny: Model, tmp_path: Path) -> None:
    async def run() -> bytes:
        async with serving(lambda: tiny, tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            head = f"POST {CHAT} HTTP/1.1\r\nhost: engine\r\ncontent-length: {MAX_BODY_BYTES + 1}\r\n\r\n"
            writer.write(head.encode())
            try:
                return await reader.readline()
            finally:
                writer.close()

    assert asyncio.run(run()).startswith(b"HTTP/1.1 413 ")


def test_ignored_fields_are_listed_at_debug_and_nothing_else_of_the_request(
    talk: Callable[[Talk], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def conversation(client: httpx.AsyncClient, engine: Engine) -> int:
        return (await client.post(CHAT, json=HELLO | {"dry_multiplier": 77, "xtc_threshold": 1})).status_code

    with caplog.at_level("DEBUG", logger="local_engine"):
        assert talk(conversation) == 200
    assert [record.getMessage() for record in caplog.records if record.name == "local_engine.server"] == [
        "fields that mean nothing here were ignored: dry_multiplier, xtc_threshold"
    ]


@pytest.mark.parametrize("body", [b"", b'{"messages": [{"role": "user", ', orjson.dumps(HELLO)])
def test_a_client_that_leaves_while_it_asks_harms_nobody(
    tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    """Before its body, in its midst, and as soon as it is there."""

    async def run() -> None:
        async with serving(lambda: tiny, tmp_path / "s") as (client, engine):
            _, writer = await asyncio.open_unix_connection(tmp_path / "s")
            length = max(len(body), 100)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: engine\r\ncontent-length: {length}\r\n\r\n".encode())
            writer.write(body.ljust(length) if body.endswith(b"}") else body)
            await writer.drain()
            writer.close()
            assert (await client.post(CHAT, json=HELLO)).status_code == 200
            await until(lambda: engine.idle)
            assert engine.report().load.free_blocks == 256

    with caplog.at_level("WARNING"):
        asyncio.run(run())
    assert not caplog.records


@pytest.mark.parametrize("extra", [0, 1])
def test_a_prompt_may_fill_the_window_but_for_one_token(talk: Callable[[Talk], Any], extra: int) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> httpx.Response:
        asked = {"prompt": [70] * (255 + extra), "temperature": 0}
        return await client.post("/v1/completions", json=asked)

    response = talk(conversation)
    if extra:
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    else:
        assert response.json()["usage"]["total_tokens"] == 256
        assert response.json()["choices"][0]["finish_reason"] == "length"


def test_a_long_body_does_not_hold_up_the_event_loop(tiny: Model, tmp_path: Path) -> None:
    """It is read and encoded on another thread: while it is, the loop answers others."""
    reading, go_on = threading.Event(), threading.Event()

    class Held(Text):
        def encode(self, prompt: str, *, special_tokens: bool = True) -> list[int]:
            reading.set()
            assert go_on.wait(30)
            return super().encode(prompt, special_tokens=special_tokens)

    held = Held(
        Tokenizer.from_str(tiny.text.tokenizer_json()),
        lambda messages: "",
        chat_template="",
        bos_token=None,
        eos_token=None,
        eos_token_id=None,
    )

    async def run() -> httpx.Response:
        async with serving(lambda: replace(tiny, text=held), tmp_path / "s") as (client, _):
            long = asyncio.create_task(client.post("/v1/completions", json={"prompt": "fox " * 5000}))
            await until(reading.is_set)
            assert (await client.get("/health")).status_code == 200
            go_on.set()
            return await long

    assert asyncio.run(run()).json()["error"]["code"] == "context_length_exceeded"


def test_request_ids_are_taken_over_or_made(talk: Callable[[Talk], Any]) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> list[str]:
        ids = {"x-request-id": "mine-1"}
        responses = [
            await client.post(CHAT, json=HELLO, headers=ids),
            await client.get("/nope", headers=ids),
            await client.get("/health"),
        ]
        return [response.headers["x-request-id"] for response in responses]

    first, second, made = talk(conversation)
    assert (first, second) == ("mine-1", "mine-1")
    assert made.startswith("req-")


@pytest.mark.parametrize("stream", [True, False])
def test_a_first_token_that_cannot_come_in_time_is_refused_with_the_predicted_wait(
    talk: Callable[[Talk], Any], stream: bool
) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> httpx.Response:
        await client.post(CHAT, json=HELLO)  # measures
        hurry = {"x-hybridgate-first-token-by": "0.0001"}
        return await client.post(CHAT, json=HELLO | {"stream": stream}, headers=hurry)

    response = talk(conversation)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "first_token_too_late")
    assert int(response.headers["retry-after"]) >= 1
    assert int(response.headers["x-hybridgate-predicted-wait-ms"]) >= 1
    assert response.headers["x-hybridgate-queue-position"] == "1"


def test_load_counts_and_measures(talk: Callable[[Talk], Any]) -> None:
    async def conversation(client: httpx.AsyncClient, engine: Engine) -> tuple[Any, Any, Limits]:
        before = (await client.get("/load")).json()
        await client.post(CHAT, json=HELLO)
        return before, (await client.get("/load")).json(), engine.model.limits

    before, after, known = talk(conversation)
    assert before == {
        "version": 1,
        "waiting": 0,
        "running": 0,
        "max_running": known.max_running,
        "max_batch_tokens": known.max_batch_tokens,
        "queued_prefill_tokens": 0,
        "free_blocks": 256,
        "total_blocks": 256,
        "block_size": 16,
        "prefill_tokens_per_second": None,
        "decode_tokens_per_second": None,
        "step_ms": None,
        "steps_total": 0,
        "aborted_total": 0,
        "finished_total": 0,
        "preempted_total": 0,
        "out_of_memory_total": 0,
        "prefix_asked_tokens_total": 0,
        "prefix_found_tokens_total": 0,
        "guessed_tokens_total": 0,
        "accepted_tokens_total": 0,
        "acceptance": None,
    }
    assert (after["steps_total"], after["finished_total"], after["free_blocks"]) == (6, 1, 256)
    assert after["prefill_tokens_per_second"] > 0
    assert after["decode_tokens_per_second"] > 0
    assert after["step_ms"] > 0


def test_the_tokenizer_that_is_served_counts_as_the_engine_does(talk: Callable[[Talk], Any]) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> tuple[Any, Any, Any]:
        served = (await client.get("/tokenizer")).json()
        chat = (await client.post("/tokenize", json={"messages": HELLO["messages"]})).json()
        usage = (await client.post(CHAT, json=HELLO)).json()["usage"]
        plain = (await client.post("/tokenize", json={"prompt": "the quick brown fox"})).json()
        assert (
            Tokenizer.from_str(orjson.dumps(served["tokenizer"]).decode()).encode("the quick brown fox").ids
            == plain["tokens"]
        )
        return served, chat, usage

    served, chat, usage = talk(conversation)
    assert chat["count"] == len(chat["tokens"]) == usage["prompt_tokens"]
    assert (served["context_window"], served["eos_token"], served["model"]) == (256, "<|end|>", "tiny")
    assert "message.content" in served["chat_template"]


@pytest.mark.parametrize("prompt", ["the fox", [70, 71, 72]])
def test_a_completion_continues_text_or_tokens(talk: Callable[[Talk], Any], prompt: object) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> Any:
        return (await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0})).json()

    answer = talk(conversation)
    assert (answer["object"], answer["usage"]["completion_tokens"]) == ("text_completion", 4)
    assert answer["choices"][0]["text"]


@pytest.mark.parametrize(("prompt", "said"), [([5000], "token ids must be below 293"), ("", "the prompt is empty")])
def test_a_completion_without_usable_tokens_is_refused(talk: Callable[[Talk], Any], prompt: object, said: str) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> httpx.Response:
        return await client.post("/v1/completions", json={"prompt": prompt})

    response = talk(conversation)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_a_prompt_that_the_kv_cache_cannot_hold_is_refused_with_both_numbers(tiny: Model, tmp_path: Path) -> None:
    narrow = replace(tiny, limits=limits(SETTINGS, window=256, kv_cache_tokens=64))

    async def run() -> httpx.Response:
        async with serving(lambda: narrow, tmp_path / "s") as (client, _):
            return await client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 100}]})

    error = asyncio.run(run()).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "the prompt has 103 tokens, the model's KV cache holds 64" in error["message"]


def test_a_full_queue_is_answered_503(tiny: Model, tmp_path: Path) -> None:
    runner = GatedRunner(tiny.runner)
    crowded = replace(tiny, runner=runner, limits=replace(tiny.limits, max_running=1, max_waiting=1))

    async def run() -> httpx.Response:
        async with serving(lambda: crowded, tmp_path / "s") as (client, engine):
            first = asyncio.create_task(client.post(CHAT, json=HELLO))
            await until(lambda: engine.scheduler.load().running == 1)
            second = asyncio.create_task(client.post(CHAT, json=HELLO))
            await until(lambda: engine.scheduler.load().waiting == 1)
            third = await client.post(CHAT, json=HELLO)
            runner.gate.release(1000)
            assert [(await first).status_code, (await second).status_code] == [200, 200]
            return third

    response = asyncio.run(run())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in response.headers


def test_a_lower_priority_number_overtakes_in_the_queue(tiny: Model, tmp_path: Path) -> None:
    runner = GatedRunner(tiny.runner)
    narrow = replace(tiny, runner=runner, limits=replace(tiny.limits, max_running=1))

    async def run() -> list[str]:
        ended = []
        async with serving(lambda: narrow, tmp_path / "s") as (client, engine):

            async def ask(priority: str) -> None:
                await client.post(CHAT, json=HELLO, headers={"x-hybridgate-priority": priority})
                ended.append(priority)

            async with asyncio.TaskGroup() as group:
                for open_requests, priority in enumerate(("0", "5", "-1"), start=1):
                    group.create_task(ask(priority))
                    await until(lambda: len(engine._generations) == open_requests)  # noqa: B023
                await until(lambda: engine.report().load.running == 1)
                runner.gate.release(1000)
        return ended

    assert asyncio.run(run()) == ["0", "-1", "5"]


def test_while_the_model_loads_the_socket_answers(tiny: Model, tmp_path: Path) -> None:
    gate = threading.Event()

    def slowly() -> Model:
        gate.wait()
        return tiny

    async def run() -> None:
        async with serving(slowly, tmp_path / "s", wait=False) as (client, engine):
            health = await client.get("/health")
            assert (health.status_code, health.json()) == (503, {"status": "loading", "model": "tiny"})
            for path in (CHAT, "/v1/completions", "/tokenize"):
                refused = await client.post(path, json=HELLO)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
                assert "retry-after" in refused.headers
            gate.set()
            await until(lambda: engine.state is State.READY)
            assert (await client.get("/health")).json() == {"status": "ready", "model": "tiny"}
            assert (await client.post(CHAT, json=HELLO)).status_code == 200

    asyncio.run(run())


def test_a_model_that_does_not_load_is_shown_with_its_reason(tmp_path: Path) -> None:
    def fail() -> Model:
        raise LoadError("nowhere is not a directory: give one")

    async def run() -> None:
        async with serving(fail, tmp_path / "s") as (client, _):
            health = await client.get("/health")
            assert health.status_code == 503
            assert health.json()["status"] == "failed"
            assert health.json()["error"] == "nowhere is not a directory: give one"
            assert (await client.post(CHAT, json=HELLO)).status_code == 503

    asyncio.run(run())


def test_nothing_that_a_caller_sent_is_logged(tiny: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where the code that handles it breaks and quotes it."""

    class Broken(GatedRunner):
        def forward(self, batch: Batch) -> Any:
            raise RuntimeError("the prompt was hunter2")

    async def run() -> None:
        async with serving(lambda: replace(tiny, runner=Broken(tiny.runner)), tmp_path / "s") as (client, _):
            body = {"messages": [{"role": "user", "content": "hunter2"}], "stop": "hunter2"}
            answer = await client.post(CHAT, json=body, headers={"authorization": "Bearer hunter2"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
            assert "hunter2" not in answer.text

    with caplog.at_level("DEBUG"):
        asyncio.run(run())
    assert "RuntimeError" in caplog.text
    assert "hunter2" not in caplog.text


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            lambda t: set(orjson.loads(t)) == {"name", "age"},
        ),
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, lambda t: re.fullmatch("[a-c]{3}-[0-9]{2}", t)),
        ({"guided_choice": ["yes", "no", 'per"haps']}, lambda t: t in ("yes", "no", 'per"haps')),
    ],
    ids=["schema", "regex", "choice"],
)
def test_an_answer_follows_the_structure_that_is_asked_for(
    talk: Callable[[Talk], Any], asked: dict[str, object], fits: Callable[[str], object], seed: int
) -> None:
    """A random model says nonsense, and still only what fits; the answer ends when nothing may follow."""

    async def conversation(client: httpx.AsyncClient, _: Engine) -> Any:
        body = HELLO | asked | {"max_tokens": 120, "seed": seed, "temperature": 1.5}
        return (await client.post(CHAT, json=body)).json()

    (choice,) = talk(conversation)["choices"]
    assert choice["finish_reason"] == "stop"
    assert fits(choice["message"]["content"])


def test_more_choices_than_may_ever_wait_are_not_asked_to_come_again(tiny: Model, tmp_path: Path) -> None:
    async def run() -> httpx.Response:
        few = replace(tiny, limits=replace(tiny.limits, max_waiting=3))
        async with serving(lambda: few, tmp_path / "s") as (client, _):
            assert (await client.post(CHAT, json=HELLO | {"n": 3})).status_code == 200
            return await client.post(CHAT, json=HELLO | {"n": 4})

    refused = asyncio.run(run())
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "3" in refused.json()["error"]["message"]


def test_several_choices_differ_stream_together_and_compute_their_prompt_once(talk: Callable[[Talk], Any]) -> None:
    long = {"messages": [{"role": "user", "content": "the quick brown fox " * 8}], "seed": 3, "max_tokens": 8, "n": 3}

    async def conversation(client: httpx.AsyncClient, engine: Engine) -> Any:
        whole = (await client.post(CHAT, json=long)).json()
        single = (await client.post(CHAT, json=long | {"n": 1})).json()
        streamed = chunks((await client.post(CHAT, json=long | {"stream": True})).text)
        return whole, single, streamed, engine.report()

    whole, single, streamed, report = talk(conversation)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == single["choices"][0]["message"]["content"]
    for index, text in enumerate(texts):
        own = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == text
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "length"
    assert report.prefix_found > 0.7 * report.prefix_asked
    assert single["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_likelihoods_come_with_every_token_that_is_shown(talk: Callable[[Talk], Any]) -> None:
    async def conversation(client: httpx.AsyncClient, _: Engine) -> Any:
        no_special = {str(token): -100 for token in range(4)}  # these are chosen, and not shown
        body = HELLO | {
            "logprobs": True,
            "top_logprobs": 2,
            "max_tokens": 6,
            "temperature": 0,
            "logit_bias": no_special,
        }
        return (await client.post(CHAT, json=body)).json()

    choice = talk(conversation)["choices"][0]
    told = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in told) == choice["message"]["content"]
    for entry in told:
        assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"] < 0
        assert len(entry["top_logprobs"]) == 2


@pytest.fixture(scope="module")
def roomy(write_model: Callable[..., Path]) -> Model:
    """One that tools fit into."""
    return load(Settings(model=str(write_model("llama", window=2048))))


class Recital:
    """Says the given tokens, whatever the prompt, and then the end."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = [*tokens, END]

    def forward(self, batch: Batch) -> list[int]:
        return [self._tokens[chunk.sequence.generated] for chunk in batch if chunk.samples]

    def sample(self, logits: list[int], rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        return [logits[row] for row in rows]

    def likelihoods(
        self, logits: list[int], rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        return [Likelihood(token, -1.0) for token in tokens]


AT = {"type": "object", "properties": {"at": {"enum": ["a", "b"]}}, "required": ["at"], "additionalProperties": False}
WAIT = {"type": "function", "function": {"name": "wait"}}
WRONG = {"type": "function", "function": {"name": "f", "parameters": {"type": "hunter2"}}}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}},
    WAIT,
]
CALLING = HELLO | {"tools": TOOLS}


def able(roomy: Model, family: Family = HERMES, said: str | None = None) -> Model:
    """A model whose template knows tools; with `said`, one that says just that."""
    tokenizer = Tokenizer.from_str(roomy.text.tokenizer_json())
    text = Text(
        tokenizer,
        lambda shown: f"<|user|>{orjson.dumps([list(shown.messages), list(shown.tools)]).decode()}<|assistant|>",
        chat_template="",
        bos_token=None,
        eos_token=None,
        eos_token_id=END,
        family=family,
    )
    runner = roomy.runner if said is None else Recital(tokenizer.encode(said).ids)
    return replace(roomy, text=text, runner=runner)


def answered(model: Model, path: Path, **fields: Any) -> tuple[Any, list[Any]]:
    """The answer to a request with tools, and the events of the same as a stream."""

    async def run() -> tuple[Any, list[Any]]:
        async with serving(lambda: model, path / "s") as (client, _):
            body = CALLING | {"max_tokens": 150} | fields
            plain = await client.post(CHAT, json=body)
            return plain.json(), chunks((await client.post(CHAT, json=body | {"stream": True})).text)

    return asyncio.run(run())


def gathered(events: list[Any]) -> tuple[str, list[Any], str]:
    """A stream put together as clients do."""
    text, finish = "", ""
    made: list[Any] = []
    for event in events:
        (choice,) = event["choices"]
        text += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", ()):
            if call["index"] == len(made):
                made.append({key: call[key] for key in ("id", "type", "function")})
            else:
                made[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        finish = choice["finish_reason"] or finish
    return text, made, finish


def test_calls_come_as_openai_has_them_plain_and_streamed(roomy: Model, tmp_path: Path) -> None:
    said = (
        'I look. <tool_call>\n{"name": "look", "arguments": {"at": "fox"}}\n</tool_call>\n<tool_call>{"name": "wait", '
    )
    said += '"arguments": {}}</tool_call>'
    answer, events = answered(able(roomy, said=said), tmp_path)
    (choice,) = answer["choices"]
    message = choice["message"]
    called = [(c["type"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    assert called == [("function", "look", '{"at": "fox"}'), ("function", "wait", "{}")]
    assert (message["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
    text, made, finish = gathered(events)
    assert (text, finish) == ("I look.", "tool_calls")
    assert [c["function"] for c in made] == [c["function"] for c in message["tool_calls"]]
    assert len({c["id"] for c in [*made, *message["tool_calls"]]}) == 4
    assert sum("tool_calls" in e["choices"][0]["delta"] for e in events) > 4  # the arguments come as they are written


def test_an_answer_without_a_call_is_an_answer(roomy: Model, tmp_path: Path) -> None:
    answer, events = answered(able(roomy, said="the fox <tool"), tmp_path)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "the fox <tool"}
    assert gathered(events) == ("the fox <tool", [], "stop")


def test_a_call_that_is_cut_says_so(roomy: Model, tmp_path: Path) -> None:
    said = '<tool_call>{"name": "look", "arguments": {"at": "the quick brown fox"}}</tool_call>'
    answer, events = answered(able(roomy, said=said), tmp_path, max_tokens=65)
    assert answer["choices"][0]["finish_reason"] == gathered(events)[2] == "length"
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"at')


@pytest.mark.parametrize("family", [HERMES, LLAMA, MISTRAL], ids=lambda family: family.name)
@pytest.mark.parametrize("choice", ["required", WAIT], ids=["any", "named"])
def test_a_call_that_is_required_comes_from_a_model_that_says_nonsense(
    roomy: Model, tmp_path: Path, family: Family, choice: object
) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": AT}}, WAIT]
    answer, events = answered(
        able(roomy, family), tmp_path, tools=tools, tool_choice=choice, parallel_tool_calls=False, temperature=1, seed=5
    )
    (given,) = answer["choices"]
    assert given["finish_reason"] == "tool_calls"
    (call,) = given["message"]["tool_calls"]
    arguments = orjson.loads(call["function"]["arguments"])
    assert (call["function"]["name"], arguments) in [("look", {"at": "a"}), ("look", {"at": "b"}), ("wait", {})]
    assert choice == "required" or call["function"]["name"] == "wait"
    assert gathered(events)[1][0]["function"] == call["function"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "only a JSON Schema"),
        ({"guided_regex": "a"}, "only a JSON Schema"),
        ({"tool_choice": "required", "tools": [WRONG]}, "cannot be followed"),
    ],
)
def test_what_cannot_be_had_together_is_refused(
    roomy: Model, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    answer, _ = answered(able(roomy), tmp_path, **fields)
    assert answer["error"]["code"] == "invalid_request"
    assert said in answer["error"]["message"]
    assert "hunter2" not in answer["error"]["message"]


def test_tools_are_refused_where_the_model_knows_none(roomy: Model, tmp_path: Path) -> None:
    answer, _ = answered(roomy, tmp_path)
    assert (answer["error"]["code"], answer["error"]["param"]) == ("invalid_request", "tools")


def test_an_engine_says_what_its_model_is_able_to_do(roomy: Model, tmp_path: Path) -> None:
    async def told(model: Model) -> Any:
        async with serving(lambda: model, tmp_path / "s") as (client, _):
            return (await client.get("/tokenizer")).json()["capabilities"]

    assert asyncio.run(told(roomy)) == ["schema"]
    assert asyncio.run(told(able(roomy))) == ["schema", "tools"]
    assert asyncio.run(told(replace(roomy, grammars=None))) == []


def test_an_answer_goes_on_from_the_beginning_that_is_given(talk: Callable[[Talk], Any]) -> None:
    """Greedy, the rest of an answer follows from its beginning."""

    async def conversation(client: httpx.AsyncClient, _: Engine) -> tuple[Any, ...]:
        whole = (await client.post(CHAT, json=HELLO | {"max_tokens": 12})).json()["choices"][0]["message"]["content"]
        tokens = (await client.post("/tokenize", json={"prompt": whole})).json()["tokens"]
        begun = [*HELLO["messages"], {"role": "assistant", "content": whole[: len(whole) // 2]}]  # type: ignore[misc]
        counts = [
            (await client.post("/tokenize", json={"messages": begun} | more)).json()["tokens"]
            for more in ({}, {"add_generation_prompt": False}, {"continue_final_message": True})
        ]
        rest = await client.post(CHAT, json={"messages": begun, "continue_final_message": True, "temperature": 0})
        return tokens, counts, rest.status_code

    _, (opened, closed, continued), status = talk(conversation)
    assert opened == [*closed, 3]
    assert closed == [*continued, END]
    assert status == 200
