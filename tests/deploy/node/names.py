"""The cluster's DNS: a server of A records over UDP, for names of Services. Refuses everything else."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from tests.deploy.node.programs import within

ZONE = "cluster.local"
TIME_TO_LIVE = 5  # seconds, as CoreDNS says of a cluster's names
Lookup = Callable[[str], Sequence[str] | None]

_A = 1
_NO_SUCH_NAME = 3


def answer(query: bytes, lookup: Lookup) -> bytes:
    """To a query of one question. `lookup` gives the addresses of a name, None where there is no such name. Raises
    ValueError where it is no query."""
    try:
        identity, flags, questions = struct.unpack_from("!HHH", query)
        labels, at = [], 12
        while length := query[at]:
            labels.append(query[at + 1 : at + 1 + length].decode("ascii"))
            at += 1 + length
        (kind,) = struct.unpack_from("!H", query, at + 1)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise ValueError("no DNS query") from None
    if questions != 1 or flags & 0x8000:
        raise ValueError("no DNS query")
    found = lookup(".".join(labels).lower())
    addresses = list(found or ()) if kind == _A else []
    code = _NO_SUCH_NAME if found is None else 0
    head = struct.pack(
        "!HHHHHH", identity, 0x8580 | code, 1, len(addresses), 0, 0
    )  # authoritative, recursion available
    records = [struct.pack("!HHHIH", 0xC00C, _A, 1, TIME_TO_LIVE, 4) + socket.inet_aton(one) for one in addresses]
    return head + query[12 : at + 5] + b"".join(records)


class Server:
    """Answers on port 53 of an address in a network namespace, in a thread, until `close`."""

    def __init__(self, namespace: str, address: str, lookup: Lookup) -> None:
        with within(namespace):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        self._lookup = lookup
        self._closed = threading.Event()
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closed.is_set():
            with suppress(TimeoutError, ValueError):
                query, source = self._socket.recvfrom(4096)
                self._socket.sendto(answer(query, self._lookup), source)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._socket.close()
