"""Environment to frozen `Settings`. Every variable is also a flag of `hybridgate serve`. Refuses names it does not
know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

PREFIX = "HYBRIDGATE_"

# The engine's own, which a deployments file may name: `api_key: ${HYBRIDGATE_ENGINE_TOKEN}`.
_ENGINES = frozenset({"HYBRIDGATE_ENGINE_TOKEN"})


class SettingsError(ValueError):
    """A setting that cannot be used; the message says which one, and what to do. It quotes no value."""


_A_DAY = 86_400.0
MOST_WORKERS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """What `hybridgate serve` was told. `local_model` replaces the model of the deployment that is served locally.
    Invariant: each number can be used; raises `SettingsError` otherwise."""

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    policy: str = ""
    keys: str = ""
    local_model: str = ""
    max_body_bytes: int = 32 * 1024 * 1024
    drain_delay_seconds: float = 0.0
    drain_seconds: float = 20.0
    engine_start_seconds: float = 600.0
    open_to_network: bool = False
    admin_host: str = "127.0.0.1"
    admin_port: int = 9090
    log: str = "-"
    redis_url: str = field(default="", repr=False)
    redis_zone: str = ""
    cache_secret: str = ""
    cache_entries: int = 100_000
    cache_bytes: int = 64 * 1024 * 1024
    usage_file: str = ""
    usage_file_megabytes: int = 100
    usage_stream: bool = False
    usage_stream_entries: int = 1_000_000

    def __post_init__(self) -> None:
        wrong = [
            f"{PREFIX}{name.upper()} must be {range}"
            for name, right, range in (
                ("port", 0 <= self.port <= 65_535, "a port, 0 to 65535"),
                ("workers", 1 <= self.workers <= MOST_WORKERS, f"1 to {MOST_WORKERS}"),
                (
                    "workers",
                    self.workers <= 1 or bool(self.redis_url),
                    f"1 without {PREFIX}REDIS_URL, where several count limits and budgets together: set it, or run one",
                ),
                ("admin_port", -1 <= self.admin_port <= 65_535, "a port, 0 to 65535, or -1 for none"),
                ("max_body_bytes", self.max_body_bytes >= 1, "at least 1"),
                ("cache_entries", self.cache_entries >= 0, "0 or more"),
                ("cache_bytes", self.cache_bytes >= 0, "0 or more"),
                ("redis_zone", bool(self.redis_url) or not self.redis_zone, f"used with {PREFIX}REDIS_URL"),
                ("cache_secret", bool(self.redis_url) or not self.cache_secret, f"used with {PREFIX}REDIS_URL"),
                ("usage_stream_entries", self.usage_stream_entries >= 0, "0 or more"),
                ("usage_file_megabytes", 1 <= self.usage_file_megabytes <= 1_000_000, "1 to 1000000"),
                ("drain_delay_seconds", 0 <= self.drain_delay_seconds <= _A_DAY, "0 to 86400 seconds"),
                ("drain_seconds", 0 <= self.drain_seconds <= _A_DAY, "0 to 86400 seconds"),
                ("engine_start_seconds", 0 < self.engine_start_seconds <= _A_DAY, "above 0 and at most 86400 seconds"),
            )
            if not right
        ]
        if wrong:
            raise SettingsError("; ".join(wrong))


_FIELDS = {PREFIX + known.name.upper(): known for known in fields(Settings)}


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Settings from HYBRIDGATE_* variables. Raises `SettingsError` naming every variable that is wrong."""
    values: dict[str, object] = {}
    wrong: list[str] = []
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in _ENGINES:
            continue
        if name not in _FIELDS:
            near = get_close_matches(name, _FIELDS, n=1)
            wrong.append(f"{name} is not a setting" + (f" (did you mean {near[0]}?)" if near else ""))
        else:
            known = _FIELDS[name]
            try:
                values[known.name] = _CONVERT[str(known.type)](text)
            except ValueError as error:
                wrong.append(f"{name} {error}")
    if wrong:
        raise SettingsError("; ".join(wrong))
    return Settings(**values)  # type: ignore[arg-type]


def _whole(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
        raise ValueError("must be a whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number of seconds") from None


def _truth(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise ValueError("must be true or false")
    return text.lower() in ("1", "true", "yes")


_CONVERT: Mapping[str, Callable[[str], object]] = {"str": str, "int": _whole, "float": _seconds, "bool": _truth}
