"""`x-ratelimit-*` headers as OpenAI sends them: of the caller's limits on requests and on tokens the one with the least
left, what it allows, what is left of it, and how long until all of it is there again. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.ledger.base import Limit, Unit, leaves_ms, place_of

Header = tuple[bytes, bytes]
_UNITS: Mapping[Unit, bytes] = {"requests": b"requests", "tokens": b"tokens"}


def ratelimit_headers(
    limits: Sequence[Limit], used: Sequence[int | None], now_ms: int, waits: Mapping[str, int]
) -> list[Header]:
    """`used`: how much of each is taken; None where nobody knows, and nothing is said of those. `now_ms`: milliseconds
    since 1970 on the ledger's clock. `waits`: by account, how long until what was refused fits, in milliseconds."""
    tightest: dict[Unit, tuple[int, Limit]] = {}
    for limit, taken in zip(limits, used, strict=True):
        if taken is not None and limit.unit in _UNITS:
            left = max(0, limit.most - taken)
            known = tightest.get(limit.unit)
            if known is None or left < known[0]:
                tightest[limit.unit] = left, limit
    headers: list[Header] = []
    for unit, (left, limit) in tightest.items():
        what = _UNITS[unit]
        reset = waits.get(limit.account)
        reset = _all_back_ms(limit, now_ms) if reset is None else reset
        headers += [
            (b"x-ratelimit-limit-" + what, b"%d" % limit.most),
            (b"x-ratelimit-remaining-" + what, b"%d" % left),
            (b"x-ratelimit-reset-" + what, duration(reset).encode()),
        ]
    return headers


def _all_back_ms(limit: Limit, now_ms: int) -> int:
    """Until what was taken at `now_ms` no longer counts."""
    if limit.kind == "rolling":
        return leaves_ms(place_of(now_ms), limit.window) - now_ms
    return next((start * 1000 - now_ms for start in limit.starts if start * 1000 > now_ms), 0)


def duration(ms: int) -> str:
    """As OpenAI writes it: `120ms`, `1.5s`, `6m0s`, `1h2m3s`."""
    if ms < 1000:
        return f"{max(ms, 0)}ms"
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, whole = divmod(-(-ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{whole}s"
