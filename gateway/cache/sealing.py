"""Encryption of stored answers: AES-256-GCM, each bound to the request's key and to what stands beside it in clear, so
that no entry can be put in another one's place.

Owns the form of the secret: 32 bytes as base64 or hexadecimal digits. Refuses to tell it, and why an entry does not
open. With another secret all keys are others too, so that what was stored is not found, and goes when its time is over.
"""

from __future__ import annotations

import base64
import binascii
import os
from hashlib import blake2b

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SECRET_BYTES = 32
_NONCE_BYTES = 12  # random: after 2^32 entries under one secret two could be alike (NIST SP 800-38D, 8.3)
_NAME_BYTES = 4


class Seal:
    """Seals and opens. `name` says which secret that is; `digest_secret` follows from it, for the keys of entries."""

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError unless it is SECRET_BYTES long."""
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret is {SECRET_BYTES} bytes")
        self._cipher = AESGCM(secret)
        self.name = blake2b(secret, digest_size=_NAME_BYTES, person=b"hybridgate-seals").hexdigest()
        self.digest_secret = blake2b(secret, digest_size=32, person=b"hybridgate-names").digest()

    def sealed(self, text: bytes, beside: bytes) -> bytes:
        """The text, which only opens beside the same words."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, text, beside)

    def opened(self, sealed: bytes, beside: bytes) -> bytes:
        """The text. Raises ValueError where it does not open."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], beside)
        except (InvalidTag, ValueError):
            raise ValueError("it does not open") from None


def secret_in(text: str) -> bytes:
    """The secret that a file holds. Raises ValueError, which quotes nothing."""
    text = text.strip()
    try:
        secret = bytes.fromhex(text) if len(text) == 2 * SECRET_BYTES else base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"holds no secret of {SECRET_BYTES} bytes; make one with: openssl rand -base64 32")
    return secret
