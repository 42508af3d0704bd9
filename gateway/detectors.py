"""The table of detectors: which shapes private data and secrets have.

Owns the patterns (RE2, over UTF-8 text); one row is one shape, and a kind has as many rows as it needs. Refuses to
normalise text and to run anything (`labels.py` does), and to judge a candidate (`checks.py` does).

The shapes of secrets are those of the providers' documentation, compared with gitleaks' public rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway import checks
from gateway.checks import COUNTRIES, PHONE_WORDS

Check = Callable[[bytes, int, int], bool]


@dataclass(frozen=True, slots=True)
class Detector:
    """One shape of one kind.

    `pattern` finds candidates, and `check(text, start, end)` decides on each. `hint` is a cheaper pattern that fires
    wherever `pattern` does. `overlaps`: a rejected candidate may hide another one that begins within it; candidates of
    such a row are short.
    """

    kind: str
    pattern: str
    check: Check = checks.always
    hint: str | None = None
    overlaps: bool = False


# Between the digits of one number: spaces, one dash or dot among them, a line break.
_GAP = r"[ \t\r\n.\-]{0,3}"


# Prefixes that providers give their keys, so that they can be found.
_TOKENS = (
    r"sk-(?:proj|svcacct|admin|or-v1|ant-[a-z]+[0-9]{2})-[A-Za-z0-9_\-]{20,}",  # OpenAI, OpenRouter, Anthropic
    r"sk-[A-Za-z0-9]{20,}",  # OpenAI, DeepSeek and others
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}",  # AWS access key id
    r"(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}",
    r"AIza[0-9A-Za-z_\-]{35}|GOCSPX-[A-Za-z0-9_\-]{28}",  # Google
    r"xox[abeoprs]-[A-Za-z0-9\-]{10,}|xapp-\d-[A-Za-z0-9\-]{20,}|hooks\.slack\.com/services/T[A-Z0-9]+/B[A-Z0-9]+/[A-Za-z0-9]{20,}",
    r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/=]{24,}",  # Stripe
    r"hf_[A-Za-z0-9]{30,}|r8_[A-Za-z0-9]{37}|gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{40,}|pplx-[A-Za-z0-9]{40,}|nvapi-[A-Za-z0-9_\-]{40,}",
    r"gl(?:pat|ptt|dt|rt|oas|cbt|ft|soat|imt|agent)-[A-Za-z0-9_\-.]{20,}",  # GitLab
    r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_\-]{50,}|dckr_pat_[A-Za-z0-9_\-]{20,}|rubygems_[a-f0-9]{48}",
    r"SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{30,}|key-[0-9a-f]{32}|SK[0-9a-f]{32}",  # SendGrid, Mailgun, Twilio
    r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|sq0(?:atp|csp)-[A-Za-z0-9_\-]{22,}|EAAA[A-Za-z0-9_\-]{60}",  # Shopify, Square
    r"do[oprt]_v1_[a-f0-9]{64}|dapi[a-f0-9]{32}|lin_api_[A-Za-z0-9]{40}|ntn_[A-Za-z0-9]{40,}|secret_[A-Za-z0-9]{43}",
    r"hv[sbr]\.[A-Za-z0-9_\-]{24,}|AGE-SECRET-KEY-1[0-9A-Z]{58}"
    r"|\.atlasv1\.[A-Za-z0-9_\-=]{60,}",  # Vault, Terraform
    r"\d:AA[A-Za-z0-9_\-]{33}"
    r"|\b[MNO][A-Za-z0-9_\-]{23,25}\.[A-Za-z0-9_\-]{6}\.[A-Za-z0-9_\-]{27,}",  # Telegram, Discord
)
_NAMES_OF_SECRETS = (
    r"(?i)(?:api|access|secret|private|auth|account|client|subscription|encryption|signing|master|shared)"
    r"[_\- ]?(?:access[_\- ]?)?(?:key|token|secret)"
    r"|(?i)(?:secret|token|passw(?:or)?d|passwd|pwd|credential|authorization|x-api-key|bearer)"
)

DETECTORS: tuple[Detector, ...] = (
    Detector(
        "email",
        r"(?i)[a-z0-9\x{80}-\x{10ffff}._%+'&\-]+\"?(?:@|%40)(?:[a-z0-9\x{80}-\x{10ffff}](?:[a-z0-9\x{80}-\x{10ffff}\-]*[a-z0-9\x{80}-\x{10ffff}])?\.)+"
        r"(?:[a-z\x{80}-\x{10ffff}]{2,24}|xn--[a-z0-9\-]{2,})",
        checks.email,
    ),
    Detector(
        "email",
        r"(?i)[a-z0-9._%+\-] ?(?:\[at\]|\(at\)|\{at\}|<at>|\[@\]|\(@\)) ?[a-z0-9\-]+"
        r"(?: ?(?:\[dot\]|\(dot\)|\{dot\}|<dot>| dot |\.) ?[a-z0-9\-]+){0,3}"
        r" ?(?:\[dot\]|\(dot\)|\{dot\}|<dot>| dot |\.) ?[a-z]{2,24}",
    ),
    Detector(
        "email",
        r"(?i)[a-z0-9._%+\-] at [a-z0-9\-]+(?: dot [a-z0-9\-]+){0,2}"
        r" dot (?:com|org|net|edu|gov|io|co|info|de|fr|uk|eu|ch|nl|it|es)\b",
    ),
    Detector(
        "email",
        r"[A-Za-z0-9._%+\-] @ [A-Za-z0-9\-]+(?: ?\. ?[A-Za-z0-9\-]+){0,3} ?\. ?[a-z]{2,24}\b",
        checks.email,
    ),
    Detector(
        "phone",
        r"(?:\+|\b00)\(?[1-9](?:[ \t\r\n.\-()/]{0,3}\d){6,14}",
        checks.international,
    ),
    Detector(
        "phone",
        r"(?:\b1[ .\-]{1,3})?(?:\([2-9]\d{2}\)[ .\-]{0,3}|\b[2-9]\d{2}(?: ?[\-/] ?|\.| {1,2}))"
        r"[2-9]\d{2}(?: ?- ?|\.| {1,2})\d{4}\b",
        checks.national,
    ),
    Detector("phone", r"(?:\(0[1-9]\d{0,4}\)|\b0[1-9]\d{0,3})(?:[ .\-/]{1,3}\d{2,8}){1,5}\b", checks.national),
    Detector("phone", r"\(\d{2}\) ?9?\d{4}[ \-]?\d{4}\b", checks.national),
    Detector(
        "phone",
        r"(?i)"
        + PHONE_WORDS
        + r"(?:[^a-z0-9]|number|num|nummer|no|nr|is|at|on|under|home|work|office|auf|unter|mobile|cell|es|est){0,10}"
        r"\(?\d(?:[ \t\r\n.\-()/]{0,3}\d){6,14}",
        checks.named_number,
    ),
    Detector("credit_card", r"\d(?:" + _GAP + r"\d){11,}", checks.card, hint=r"\d(?:" + _GAP + r"\d){11}"),
    Detector(
        "iban",
        r"(?i)\b(?:" + COUNTRIES + r")\d{2}(?:" + _GAP + r"[0-9A-Z]){11,30}",
        checks.iban,
        hint=r"(?i)\b(?:" + COUNTRIES + r")\d{2}(?:" + _GAP + r"[0-9A-Z]){11}",
        overlaps=True,
    ),
    Detector(
        "us_ssn", r"\b\d{3}(?: ?[\-.] ?|[ \t]|\r?\n)?\d{2}(?: ?[\-.] ?|[ \t]|\r?\n)?\d{4}\b", checks.ssn, overlaps=True
    ),
    Detector(
        "private_key",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----",
        checks.key_block,
    ),
    Detector("private_key", r"PuTTY-User-Key-File-\d: |AGE-SECRET-KEY-1[0-9A-Z]{58}"),
    Detector("private_key", r"(?i)\bPrivateKey\s*=\s*[A-Za-z0-9+/]{43}="),
    Detector("jwt", r"\be[wxyz][A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]*", checks.jwt),
    *(Detector("api_key", pattern, checks.token) for pattern in _TOKENS),
    Detector(
        "api_key",
        r"(?i)(?:aws|secret)[a-z_ .\-]{0,24}(?:key|secret)?[\"']?\s*(?:=>|[:=,]|is|\n)\s*[\"']?[A-Za-z0-9/+]{40}",
        checks.aws_secret,
    ),
    Detector(
        "api_key",
        r"(?:"
        + _NAMES_OF_SECRETS
        + r")[\"'\]]{0,2}\s{0,3}(?:=>|:=|[:=\n]|\bis\b|\bbearer\b|\bbasic\b)\s{0,3}(?:bearer |basic |token )?[\"'`]?"
        r"[A-Za-z0-9_./+=\-~]{16,}",
        checks.assigned,
    ),
    Detector("api_key", r"(?i)\b(?:bearer|basic) [A-Za-z0-9_./+=\-~]{20,}", checks.assigned),
    Detector(
        "api_key",
        r"[a-z0-9]://[^\s/:@\"'<>]*:[^\s/:@\"'<>]{3}[^\s/:@\"'<>]*@[A-Za-z0-9\[]",
        checks.credentials,
    ),
)
