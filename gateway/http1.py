"""uvicorn's HTTP/1.1 with two of its edges taken off: a request's head has a bound, and what cannot be parsed is
answered in the shape of every other error.

Owns what happens before there is a request. Refuses HTTP/2 and WebSockets: an `Upgrade` is ignored, as HTTP allows.
"""

from __future__ import annotations

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.errors import BadRequest, GatewayError, HeadTooLarge, body_of, status_of

MOST_HEAD_BYTES = 64 * 1024  # of the request line and all headers; what arrives together with its end does not count


class Http1(HttpToolsProtocol):
    """One connection. Invariant: at most `MOST_HEAD_BYTES` and one read of the socket are kept of an unfinished
    head."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.scope is not None and (self.cycle is None or self.cycle.scope is not self.scope):
            self._head += len(data)
            if self._head > MOST_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(HeadTooLarge(f"the request's headers are larger than {MOST_HEAD_BYTES} bytes"))
        elif self._head:
            self._head = 0

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("this is not a valid HTTP/1.1 request"))

    def _refuse(self, error: GatewayError) -> None:
        body = orjson.dumps(body_of(error))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status_of(error)] + head + body)
        self.transport.close()
