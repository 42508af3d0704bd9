"""Owns what the operator chose (Settings) and what follows for the scheduler (Limits); refuses values that cannot work.

Pure: reads no environment and no files; the command line hands the values in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from local_engine.errors import ConfigError
from local_engine.source import DEMO

BLOCK_SIZE = 16
"""Tokens in a KV block: small enough that the last, half-empty block of a sequence wastes little memory."""

DEFAULT_WINDOWS = 16
"""Full context windows that the default KV cache of a small model holds."""

BATCH_TOKENS = {"cpu": 512, "cuda": 1024}
"""Tokens a step, by kind of device: enough to keep it busy, and not so many that those who decode wait for long."""

DTYPES = ("auto", "float32", "bfloat16")

SPECULATIONS = ("off", "prompt_lookup", "draft")
"""Who guesses the next tokens: nobody, the sequence's own tokens, a small model."""

QUANTIZATIONS = ("none", "fp16", "bf16", "int8", "int4")
"""`none` keeps `dtype`; int8 and int4 (NF4, double quantization) are bitsandbytes'."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator chose. Invariant: every value is in its range (`problems` is empty).

    Token counts are in tokens, `drain_seconds` in seconds. None means: derived from the model or from memory at load.
    `eager`: on a GPU, only what torch and transformers bring: no kernels of ours, no recorded steps.
    """

    model: str
    served_name: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    chat_template: str | None = None
    threads: int = 1
    kv_cache_tokens: int | None = None
    max_batch_tokens: int | None = None
    max_running: int = 64
    max_waiting: int = 256
    max_waiting_tokens: int | None = None
    default_max_tokens: int = 256
    drain_seconds: float = 10.0
    embedding_model: str | None = None
    embedding_served_name: str | None = None
    speculation: str = "off"
    draft_model: str | None = None
    speculation_tokens: int = 8
    speculation_max_running: int = 16
    eager: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError with all problems at once."""
        if problems := self._problems():
            raise ConfigError(problems)

    @property
    def name(self) -> str:
        """The model's name in answers."""
        return self.served_name or self.model

    def batch_tokens(self, device_type: str) -> int:
        """Tokens a step on this kind of device, at least one for each running sequence."""
        return self.max_batch_tokens or max(self.max_running, BATCH_TOKENS[device_type])

    @property
    def embedding_name(self) -> str | None:
        """The embedding model's name in answers, where there is one."""
        return self.embedding_model and (self.embedding_served_name or self.embedding_model)

    def _problems(self) -> list[str]:
        problems = []
        if not self.model:
            problems.append("--model is empty: give `demo`, a directory, or a Hugging Face id")
        if self.dtype not in DTYPES:
            problems.append(f"--dtype must be one of {', '.join(DTYPES)}")
        if self.quantization not in QUANTIZATIONS:
            problems.append(f"--quantization must be one of {', '.join(QUANTIZATIONS)}")
        if self.quantization in ("fp16", "bf16") and self.dtype != "auto":
            problems.append("--quantization fp16 and bf16 say the dtype: leave --dtype out")
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < 2 * BLOCK_SIZE:
            problems.append(f"--kv-cache-tokens must be at least {2 * BLOCK_SIZE}")
        positive = {
            "--threads": self.threads,
            "--max-batch-tokens": 1 if self.max_batch_tokens is None else self.max_batch_tokens,
            "--max-running": self.max_running,
            "--max-waiting": self.max_waiting,
            "--default-max-tokens": self.default_max_tokens,
            "--speculation-tokens": self.speculation_tokens,
            "--speculation-max-running": self.speculation_max_running,
        }
        problems += [f"{flag} must be at least 1" for flag, value in positive.items() if value < 1]
        if self.max_waiting_tokens is not None and self.max_waiting_tokens < 1:
            problems.append("--max-waiting-tokens must be at least 1")
        if self.speculation not in SPECULATIONS:
            problems.append(f"--speculation must be one of {', '.join(SPECULATIONS)}")
        if self.speculation == "draft" and self.draft_model is None and self.model != DEMO:
            problems.append(
                "--speculation draft needs --draft-model, a small model of the same tokenizer (`demo` brings one)"
            )
        if self.speculation != "draft" and self.draft_model is not None:
            problems.append("--draft-model is for --speculation draft only")
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_running:
            problems.append("--max-batch-tokens must be at least --max-running: each running sequence needs one a step")
        if self.embedding_name is not None and self.embedding_name == self.name:
            problems.append("--embedding-model has the name of --model: give one of them another served name")
        if self.embedding_model is None and self.embedding_served_name is not None:
            problems.append("--embedding-served-name needs --embedding-model")
        if not 0 <= self.drain_seconds < inf:
            problems.append("--drain-seconds must be a number of seconds, not negative")
        return problems


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may use. Invariant: one whole window of `capacity` tokens always fits, alone.

    `window` and `max_batch_tokens` are in tokens, `num_blocks` in blocks of `block_size` tokens.
    """

    num_blocks: int
    window: int
    block_size: int = BLOCK_SIZE
    max_batch_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    max_waiting_tokens: int = 65_536

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may reach: the window, or the KV cache where that is smaller."""
        return min(self.window, self.num_blocks * self.block_size)


def limits(settings: Settings, *, window: int, kv_cache_tokens: int, device_type: str = "cpu") -> Limits:
    """The scheduler's limits for a model with this window (tokens) and room for so many cached tokens.

    The waiting queue holds at least one window of tokens, else a full-length prompt could never be accepted.
    """
    return Limits(
        num_blocks=max(2, kv_cache_tokens // BLOCK_SIZE),
        window=window,
        max_batch_tokens=settings.batch_tokens(device_type),
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_waiting_tokens=max(window, settings.max_waiting_tokens or 65_536),
    )


def kv_cache_tokens(settings: Settings, *, window: int, bytes_per_token: int, free_bytes: int) -> int:
    """Tokens of KV cache: what was asked for, else `DEFAULT_WINDOWS` windows, at most what `free_bytes` holds."""
    if settings.kv_cache_tokens is not None:
        return settings.kv_cache_tokens
    return max(2 * BLOCK_SIZE, min(DEFAULT_WINDOWS * window, free_bytes // bytes_per_token))
