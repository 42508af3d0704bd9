"""Encryption of stored answers: AES-256-GCM, each under the request's key and the words that stand beside it in clear,
so that no entry can be put in another one's place.

Owns the file of secrets: one a line, 32 bytes as base64 or hexadecimal digits; the first seals, all open, so that a
secret can be replaced while entries under the old one live. Refuses to tell a secret, or why an entry does not open.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SECRET_BYTES = 32
_NONCE_BYTES = 12  # random: after 2^32 entries under one secret two could be alike (NIST SP 800-38D, 8.3)
_NAME_BYTES = 4


class Seal:
    """Seals and opens. `name` says which secret seals; `digest_secret` is another secret that follows from it, for the
    keys of entries."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """Raises ValueError unless each is SECRET_BYTES long and there is one."""
        if not secrets or any(len(secret) != SECRET_BYTES for secret in secrets):
            raise ValueError(f"a secret is {SECRET_BYTES} bytes")
        self._ciphers = {_named(secret): AESGCM(secret) for secret in secrets}
        self.name = _named(secrets[0])
        self.digest_secret = blake2b(secrets[0], digest_size=32, person=b"hybridgate-names").digest()

    def sealed(self, text: bytes, beside: bytes) -> bytes:
        """The text, which only opens beside the same words."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[self.name].encrypt(nonce, text, beside)

    def opened(self, name: str, sealed: bytes, beside: bytes) -> bytes:
        """The text. Raises ValueError where it does not open."""
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise ValueError("sealed with a secret that is not known here")
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], beside)
        except (InvalidTag, ValueError):
            raise ValueError("it does not open") from None


def _named(secret: bytes) -> str:
    return blake2b(secret, digest_size=_NAME_BYTES, person=b"hybridgate-seals").hexdigest()


def secrets_in(text: str) -> list[bytes]:
    """The secrets of a file; empty lines and lines that begin with # are none. Raises ValueError, which quotes
    nothing."""
    secrets = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        secret = _secret(line)
        if secret is None:
            raise ValueError(f"line {number} is no secret: {SECRET_BYTES} bytes as base64 or 64 hexadecimal digits")
        secrets.append(secret)
    if not secrets:
        raise ValueError("has no secret; make one with: openssl rand -base64 32")
    return secrets


def _secret(line: str) -> bytes | None:
    if len(line) == 2 * SECRET_BYTES:
        try:
            return bytes.fromhex(line)
        except ValueError:
            return None
    try:
        decoded = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded if len(decoded) == SECRET_BYTES else None
