"""What a client does in the cluster, with the official OpenAI client: streams, one after another, until it is told to
stop (SIGTERM). Prints a line of JSON for each when it has begun, and again when it is over; tries nothing twice."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from dataclasses import asdict, dataclass

from openai import AsyncOpenAI, OpenAIError, omit

_LONG = 500  # tokens
_END = "1"  # the demo model's token that ends an answer


@dataclass
class Asked:
    """One request. Times are seconds since the epoch, `ended` is 0 before it has; `error` is empty where its answer
    came to its end. `request_id` is the gateway's."""

    began: float
    ended: float = 0.0
    chunks: int = 0
    text: str = ""
    deployment: str = ""
    policy: str = ""
    request_id: str = ""
    error: str = ""


async def ask(client: AsyncOpenAI, question: str, slow: float) -> Asked:
    """`slow`: 0, or seconds between two chunks of an answer that is as long as can be. Its chunks are large, so that
    it is the gateway that waits, and no buffer on the way that holds the rest."""
    asked = Asked(time.time())
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model="auto",
            messages=[{"role": "user", "content": question}],
            stream=True,
            max_tokens=_LONG if slow else 100,
            logit_bias={_END: -100} if slow else {},
            logprobs=slow > 0,
            top_logprobs=5 if slow else omit,
        )
        asked.deployment = raw.headers.get("x-hybridgate-deployment", "")
        asked.policy = raw.headers.get("x-hybridgate-policy", "")
        asked.request_id = raw.headers.get("x-request-id", "")
        finished = False
        async for chunk in raw.parse():
            if not asked.chunks:
                tell(asked)
            await asyncio.sleep(slow)
            for choice in chunk.choices:
                asked.chunks += 1
                asked.text += choice.delta.content or ""
                finished = finished or choice.finish_reason is not None
        asked.error = "" if finished else "the stream ended without a finish_reason"
    except (OpenAIError, OSError) as error:
        asked.error = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    asked.ended = time.time()
    return asked


def tell(asked: Asked) -> None:
    print(json.dumps(asdict(asked)), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.node.asks", description=__doc__)
    parser.add_argument("url", help="of the gateway, with /v1")
    parser.add_argument("--workers", type=int, default=2, help="streams at a time (default: 2)")
    parser.add_argument("--once", action="store_true", help="a stream of each worker, and an end")
    parser.add_argument("--slow", type=float, default=0.0, help="ask for long answers, seconds between two chunks")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two of a worker (default: 0.2)")
    arguments = parser.parse_args()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncOpenAI(base_url=arguments.url, api_key="none", max_retries=0, timeout=300) as client:

        async def work(worker: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                tell(await ask(client, f"Worker {worker}, question {count}: what is TTFT?", arguments.slow))
                if arguments.once:
                    return
                await asyncio.sleep(arguments.pause)

        await asyncio.gather(*(work(worker) for worker in range(arguments.workers)))


if __name__ == "__main__":
    asyncio.run(main())
