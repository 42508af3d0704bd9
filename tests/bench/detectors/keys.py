"""Secrets, drawn by chance: keys of providers and of nobody in particular, private keys, JSON web tokens, passwords.

Owns their shapes, from the providers' documentation. Refuses to hold a real one.
"""

from __future__ import annotations

import json
from base64 import b64encode, urlsafe_b64encode
from random import Random

LOWER, UPPER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
ALNUM = LOWER + UPPER + DIGITS
HEX = DIGITS + "abcdef"


def text(chance: Random, alphabet: str, count: int) -> str:
    return "".join(chance.choices(alphabet, k=count))


# Parts in turn: what stands there, or an alphabet and how many of it.
_Part = str | tuple[str, int]
_PROVIDERS: dict[str, tuple[_Part, ...]] = {
    "openai project": ("sk-proj-", (ALNUM + "-_", 74), "T3BlbkFJ", (ALNUM + "-_", 74)),
    "openai": ("sk-", (ALNUM, 20), "T3BlbkFJ", (ALNUM, 20)),
    "anthropic": ("sk-ant-api03-", (ALNUM + "-_", 93), "AA"),
    "aws id": ("AKIA", (UPPER + "234567", 16)),
    "aws session": ("ASIA", (UPPER + "234567", 16)),
    "github": ("ghp_", (ALNUM, 36)),
    "github app": ("ghs_", (ALNUM, 36)),
    "github fine": ("github_pat_", (ALNUM, 22), "_", (ALNUM, 59)),
    "gitlab": ("glpat-", (ALNUM + "-_", 20)),
    "google": ("AIza", (ALNUM + "-_", 35)),
    "google oauth": ("GOCSPX-", (ALNUM + "-_", 28)),
    "slack": ("xoxb-", (DIGITS, 12), "-", (DIGITS, 12), "-", (ALNUM, 24)),
    "slack hook": ("https://hooks.slack.com/services/T", (UPPER + DIGITS, 8), "/B", (UPPER + DIGITS, 8), "/", (ALNUM, 24)),
    "stripe": ("sk_live_", (ALNUM, 24)),
    "stripe long": ("rk_live_", (ALNUM, 99)),
    "sendgrid": ("SG.", (ALNUM + "-_", 22), ".", (ALNUM + "-_", 43)),
    "twilio": ("SK", (HEX, 32)),
    "mailgun": ("key-", (HEX, 32)),
    "hugging face": ("hf_", (LOWER + UPPER, 34)),
    "npm": ("npm_", (ALNUM, 36)),
    "pypi": ("pypi-AgEIcHlwaS5vcmc", (ALNUM + "-_", 70)),
    "digital ocean": ("dop_v1_", (HEX, 64)),
    "shopify": ("shpat_", (HEX, 32)),
    "groq": ("gsk_", (ALNUM, 52)),
    "databricks": ("dapi", (HEX, 32)),
    "telegram": ((DIGITS, 10), ":AA", (ALNUM + "-_", 33)),
    "square": ("sq0atp-", (ALNUM + "-_", 22)),
    "vault": ("hvs.", (ALNUM + "-_", 90)),
    "linear": ("lin_api_", (ALNUM, 40)),
    "postman": ("PMAK-", (HEX, 24), "-", (HEX, 34)),
    "new relic": ("NRAK-", (UPPER + DIGITS, 27)),
    "mailchimp": ((HEX, 32), "-us", (DIGITS, 1)),
    "atlassian": ("ATATT3xFfGF0", (ALNUM + "-_", 170), "=", (UPPER + DIGITS, 8)),
    "figma": ("figd_", (ALNUM + "-_", 40)),
    "grafana": ("glsa_", (ALNUM, 32), "_", (HEX, 8)),
    "docker": ("dckr_pat_", (ALNUM + "-_", 27)),
    "discord": ("M", (ALNUM, 25), ".", (ALNUM, 6), ".", (ALNUM + "-_", 38)),
}  # fmt: skip


def provider_key(chance: Random) -> str:
    """A key that its provider's prefix gives away."""
    shape = _PROVIDERS[chance.choice(list(_PROVIDERS))]
    return "".join(part if isinstance(part, str) else text(chance, *part) for part in shape)


def plain_key(chance: Random) -> str:
    """A key that only its name gives away."""
    return chance.choice(
        (
            lambda: text(chance, HEX, chance.choice((32, 40, 64))),
            lambda: text(chance, ALNUM, chance.choice((20, 24, 32, 40))),
            lambda: b64encode(chance.randbytes(chance.choice((24, 32, 48)))).decode(),
            lambda: urlsafe_b64encode(chance.randbytes(chance.choice((24, 32)))).decode().rstrip("="),
        )
    )()


def private_key(chance: Random) -> str:
    """A private key in one of the forms in which it is stored, whole or with its end cut off."""
    body = b64encode(chance.randbytes(chance.choice((48, 121, 300, 600)))).decode()
    kind = chance.choice(("RSA ", "EC ", "", "ENCRYPTED ", "OPENSSH ", "DSA "))
    width = chance.choice((64, 76, 10_000))
    lines = "\n".join(body[start : start + width] for start in range(0, len(body), width))
    whole = f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"
    pgp = f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nComment: test\n\n{lines}\n=ab1C\n-----END PGP PRIVATE KEY BLOCK-----"
    return chance.choice(
        (
            whole,
            whole,
            whole.replace("\n", "\\n"),
            whole.replace("\n", "\r\n"),
            whole.replace("\n", "\n    "),
            whole.rsplit("\n", 1)[0],
            pgp,
            f"PrivateKey = {b64encode(chance.randbytes(32)).decode()}",
        )
    )


def _part(document: object) -> str:
    return urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


def json_web_token(chance: Random) -> str:
    """A signed token."""
    header: dict[str, str] = {"alg": chance.choice(("HS256", "RS256", "ES256", "EdDSA", "PS512")), "typ": "JWT"}
    if chance.random() < 0.4:
        header["kid"] = text(chance, ALNUM, 12)
    if chance.random() < 0.3:
        header = dict(reversed(header.items()))
    claims = {"sub": text(chance, DIGITS, 8), "iat": 1_700_000_000 + chance.randrange(10**7), "scope": "read write"}
    signature = urlsafe_b64encode(chance.randbytes(chance.choice((32, 64, 256)))).decode().rstrip("=")
    return f"{_part(header)}.{_part(claims)}.{signature}"


_WORDS = (
    "dragon", "sunshine", "monkey", "winter", "summer", "falcon", "shadow", "tiger", "orange", "guitar", "coffee",
    "hunter", "secret", "blue", "river", "pepper", "maggie", "soccer", "purple", "anchor", "sommer", "hallo",
    "schatz", "soleil", "bonjour", "estrella", "amore", "kitten", "marathon", "wizard",
)  # fmt: skip


def password(chance: Random) -> str:
    """A password as people choose them, or as programs do."""
    word = chance.choice(_WORDS)
    return chance.choice(
        (
            lambda: word.capitalize() + text(chance, DIGITS, chance.choice((2, 3, 4))) + chance.choice("!?#$*."),
            lambda: word + text(chance, DIGITS, chance.choice((1, 2, 4))),
            lambda: word.replace("a", "@").replace("o", "0").replace("e", "3") + text(chance, DIGITS, 2),
            lambda: text(chance, ALNUM, chance.choice((8, 10, 12, 16))),
            lambda: text(chance, ALNUM + "!#$%*+-_=?", chance.choice((10, 14, 20))).lstrip("$%*") + "7k",
            lambda: chance.choice("-_.").join(chance.sample(_WORDS, 4)) + text(chance, DIGITS, 1),
            lambda: (
                word.capitalize() + chance.choice("!@#$") + chance.choice(_WORDS).capitalize() + text(chance, DIGITS, 2)
            ),
        )
    )()
