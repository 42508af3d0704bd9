"""Secrets: keys of providers and of nobody in particular, private keys, JSON web tokens.

Owns the shapes that providers give their keys, from their documentation, compared with gitleaks' public rules. Refuses
placeholders, variables and expressions of code.
"""

from __future__ import annotations

import binascii
import math
import re
from base64 import urlsafe_b64decode

import orjson

from gateway.detectors.base import Place, Row, whole
from gateway.detectors.passwords import in_address
from gateway.detectors.words import is_placeholder

# ---- keys whose prefix says whose they are ----

# By provider, or a few of them: a hint, and the keys. One pattern for all would have so many states that it never stops
# making new ones: each key that it had not seen cost it 2 ms.
_START = r"(?:^|[^A-Za-z0-9])"
_TOKENS = (
    (rf"{_START}sk-[A-Za-z0-9]", r"sk-(?:proj|svcacct|admin|or-v1|ant-[a-z]+[0-9]{2})-[A-Za-z0-9_\-]{20,}|sk-[A-Za-z0-9]{20,}|sk-[a-z]{2,8}-[A-Za-z0-9_\-]{24,}"),  # OpenAI, OpenRouter, Anthropic, DeepSeek and others
    (r"A[KSBC][IC]A[A-Z2-7]{4}|ABSK", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}|ABSK[A-Za-z0-9+/]{100,}"),  # AWS
    (r"gh[pousr]_|github_pat_", r"(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}"),
    (r"AIza|GOCSPX-|ya29\.|1//0|AQ\.A", r"AQ\.A[A-Za-z0-9_\-]{40,}|AIza[0-9A-Za-z_\-]{35}|GOCSPX-[A-Za-z0-9_\-]{28}|ya29\.[A-Za-z0-9_\-]{30,}|1//0[A-Za-z0-9_\-]{40,}"),  # Google
    (r"xox[a-z][.-]|xapp-|hooks\.slack", r"xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9\-]{10,}|xapp-\d-[A-Za-z0-9\-]{20,}|hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/]{30,}"),  # Slack
    (r"[srp]k_(?:live|test)_|whsec_|sk_[a-f0-9]{8}", r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/=]{24,}|sk_[a-f0-9]{48}"),  # Stripe, ElevenLabs
    (r"hg-[A-Za-z0-9]{43}", r"hg-[A-Za-z0-9]{43}"),
    (r"hf_|api_org_|r8_|gsk_|xai-|pplx-", r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|r8_[A-Za-z0-9]{37}|gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{40,}|pplx-[A-Za-z0-9]{40,}"),  # models
    (r"nvapi-|fw_|tgp_v1|pcsk_|lsv2_|ph[cx]_|csk-|tvly-", r"csk-[a-z0-9]{40,}|tvly-(?:dev-|prod-)?[A-Za-z0-9]{32,}|nvapi-[A-Za-z0-9_\-]{40,}|fw_[A-Za-z0-9]{20,}|tgp_v1_[A-Za-z0-9_\-]{30,}|pcsk_[A-Za-z0-9_]{40,}|lsv2_(?:pt|sk)_[a-f0-9]{32}_[a-f0-9]{10}|ph[cx]_[A-Za-z0-9]{40,}"),  # and what belongs to them
    (rf"{_START}gl[a-z]{{2,5}}-", r"gl(?:pat|ptt|dt|rt|oas|cbt|ft|soat|imt|agent)-[A-Za-z0-9_\-.]{20,}"),  # GitLab
    (r"npm_|pypi-|dckr_|rubygems_|CLOJARS_", r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_\-]{50,}|dckr_(?:pat|oat)_[A-Za-z0-9_\-]{20,}|rubygems_[a-f0-9]{48}|CLOJARS_[a-z0-9]{60}"),
    (rf"{_START}(?:SG\.|re_)|xkeysib", r"SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{30,}|xkeysib-[a-f0-9]{64}-[A-Za-z0-9]{16}|re_[A-Za-z0-9]{8}_[A-Za-z0-9]{20,}"),  # SendGrid, Brevo, Resend
    (r"key-[0-9a-f]{8}|SK[0-9a-f]{8}", r"key-[0-9a-f]{32}|SK[0-9a-f]{32}"),  # Mailgun, Twilio
    (r"-us\d", r"[0-9a-f]{32}-us\d{1,2}"),  # Mailchimp
    (r"shp(?:at|ca|pa|ss)_|sq0|EAA[A-Za-z0-9_\-]{8}", r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|sq0[a-z]{3}-[A-Za-z0-9_\-]{22,}|EAAA[A-Za-z0-9_\-]{60}|EAA[A-Za-z0-9]{100,}"),  # Shopify, Square, Meta
    (r"do[oprt]_v1|dapi[a-f0-9]{8}", r"do[oprt]_v1_[a-f0-9]{64}|dapi[a-f0-9]{32}"),
    (r"lin_|ntn_|secret_", r"lin_(?:api|oauth)_[A-Za-z0-9]{40}|ntn_[A-Za-z0-9]{40,}|secret_[A-Za-z0-9]{43}"),
    (r"hv[sbr]\.|AGE-SECRET|atlasv1", r"hv[sbr]\.[A-Za-z0-9_\-]{24,}|AGE-SECRET-KEY-1[0-9A-Z]{58}|\.atlasv1\.[A-Za-z0-9_\-=]{60,}"),  # Vault, Terraform
    (r"dp\.[a-z]{2,5}\.|pul-|ops_eyJ", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9.]{40,}|pul-[a-f0-9]{40}|ops_eyJ[A-Za-z0-9+/=]{100,}"),  # Doppler, Pulumi
    (r"\d:AA", r"\d{8,10}:AA[A-Za-z0-9_\-]{33}"),  # Telegram
    (r"PMAK-|NR[AJIR]|AT(?:ATT|CTT|BB)|figd_", r"PMAK-[a-f0-9]{24}-[a-f0-9]{34}|NR(?:AK|JS|II|RA)-[A-Za-z0-9\-_]{20,}|AT(?:ATT|CTT|BB)[A-Za-z0-9_\-=]{24,}|figd_[A-Za-z0-9_\-]{36,}"),
    (r"gl(?:sa|c)_|sntry", r"gl(?:sa|c)_[A-Za-z0-9_+/=]{32,}|sntry[su]_[A-Za-z0-9_+/=]{40,}"),
    (rf"{_START}pat(?:[A-Za-z0-9]{{14}}\.|-(?:na|eu)\d)", r"pat[A-Za-z0-9]{14}\.[a-f0-9]{64}|pat-(?:na|eu)\d-[a-f0-9\-]{36}"),
    (r"LTAI|AKID|AQVN|dt0", r"LTAI[A-Za-z0-9]{20}|AKID[A-Za-z0-9]{32}|AQVN[A-Za-z0-9_\-]{35,}|dt0[a-z]\d{2}\.[A-Z0-9]{24}\.[A-Z0-9]{64}"),
    (r"nfp_|vc[pk]_|sb[pv]_|sb_secret", r"nfp_[A-Za-z0-9]{36,}|vc[pk]_[A-Za-z0-9]{24,}|sb[pv]_[a-f0-9]{40}|sb_secret_[A-Za-z0-9_\-]{24,}"),
    (r"pscale_|rnd_|HRKU", r"pscale_[a-z]+_[A-Za-z0-9_\-.]{32,}|rnd_[A-Za-z0-9]{24,}|HRKU-[A-Za-z0-9_\-]{36,}"),
    (r"shippo_|duffel_|EZ[AT]K", r"shippo_(?:live|test)_[a-f0-9]{40}|duffel_(?:live|test)_[A-Za-z0-9_\-]{43}|EZ[AT]K[A-Za-z0-9]{54}"),
    (r"tfp_|fio-u|sgp_|sq[uap]_", r"tfp_[A-Za-z0-9_\-.]{40,}|fio-u-[A-Za-z0-9_\-=]{64}|sgp_[A-Za-z0-9_]{40,}|sq[uap]_[a-f0-9]{40}"),
    (r"AKCp|API-|sha256~|A3-", r"AKCp[A-Za-z0-9]{60,}|API-[A-Z0-9]{26}|sha256~[A-Za-z0-9_\-]{43}|A3-[A-Z0-9]{6}-[A-Z0-9\-]{20,}"),
    (r"fm[12]|fo1_|ico-", r"fm[12][ar]?_[A-Za-z0-9+/=]{60,}|fo1_[A-Za-z0-9_\-]{43}|ico-[A-Za-z0-9]{32}"),
    (r"pnu_|rdme_|[skp]k\.eyJ", r"pnu_[a-z0-9]{36}|rdme_[a-z0-9]{70}|[skp]k\.eyJ[A-Za-z0-9_\-]{20,}\.[A-Za-z0-9_\-]{16,}"),
    (r"\dQ~", r"[A-Za-z0-9_~.]{3}\dQ~[A-Za-z0-9_~.\-]{31,34}"),  # Azure
)  # fmt: skip
_HEX = b"0123456789abcdefABCDEF"


_MOST_WEIGHED = 128  # characters of a value
_WEIGHTS = [0.0, *(count * math.log2(count) for count in range(1, _MOST_WEIGHED + 1))]


def _evenly(text: bytes, bits: float) -> bool:
    """Whether Shannon's entropy is at least so many bits a character."""
    text = text[:_MOST_WEIGHED]
    length = len(text)
    signs = set(text)
    # The least that so many different signs can have is where all but one of them stand there once.
    most = _WEIGHTS[length] - bits * length
    return _WEIGHTS[length - len(signs) + 1] <= most or sum(map(_WEIGHTS.__getitem__, map(text.count, signs))) <= most


def token(text: bytes, start: int, end: int) -> Place | None:
    """A provider's prefix and enough of what follows it."""
    value = text[start:end]
    if text[max(0, start - 1) : start].isalnum() or is_placeholder(value) or not _evenly(value[-20:], 2.5):
        return None
    return start, end


# ---- keys that only a name beside them gives away ----

_NAMES = (
    r"(?i)(?:api|access|secret|private|auth|account|client|subscription|encryption|signing|master|shared|service|app|bot|webhook|session|refresh|deploy)"
    r"[_\- ]?(?:access[_\- ]?)?(?:keys?|tokens?|secrets?|schlüssel)\b"
    r"|(?i)(?:secret|token|credentials?|authorization|bearer|apikey|x-api-key|clé api|clé d.api|clave (?:de )?(?:la )?api|chave (?:de |da )?api|chiave api"
    r"|api[ -]?(?:nyckel|sleutel|klucz|klíč|anahtarı)|klucz api|api ?密钥|密钥|apiキー|api ?키|апи[ -]?ключ|ключ api|токен|κλειδί api|مفتاح api|एपीआई कुंजी|khóa api)"
)
_REACH = 48  # characters from a name to its value
_VALUE = re.compile(rb"[A-Za-z0-9_./+=\-~]{16,}")
_FIELD = re.compile(rb"[A-Za-z_.\-]{1,40}=")
# What joins a name to its value closely: a sign of assignment, a verb, a line break.
_LINK = re.compile(
    rb"(?i)(?:[\"'`\])}>]|_?(?:value|id|no)\b){0,3}(?:\s{1,2}value)?\s{0,3}(?:=>|:=|->|[:=#]|\xef\xbc\x9a|\n|(?:is|ist|lautet|est|es|son|to|jest|bearer|basic)\b)"
    rb"\s{0,3}(?:(?:bearer|basic|token|le|la)\s{1,2})?[\"'`(<\[]{0,2}"
)


_NO_DIGITS = bytes(code for code in range(256) if not bytes((code,)).isdigit())
_HUMP = re.compile(rb"[a-z][A-Z]")
_ALNUM = re.compile(rb"[A-Za-z0-9]+")


def _random(value: bytes) -> bool:
    """Whether a value looks drawn by chance: letters and digits, evenly used; not a word, a path or a placeholder."""
    if value.swapcase() == value or is_placeholder(value):  # without letters
        return False
    digits = value.translate(None, _NO_DIGITS)
    if not digits:  # of 24 letters drawn by chance from 64 signs, one in a hundred has no digit
        return len(value) >= 24 and len(_HUMP.findall(value)) >= 6 and _evenly(value, 4)
    return _evenly(value, 3.0 if not value.translate(None, _HEX) else 3.5)


def _mixed(value: bytes) -> bool:
    """Whether a value is one long run of digits and letters in both cases, or of hexadecimal digits."""
    run = value if value.isalnum() else max(_ALNUM.findall(value), key=len)
    if len(run) < 16:
        return False
    return (len(run) >= 24 and not run.translate(None, _HEX)) or not (
        run.islower() or run.isupper() or run.isalpha() or run.isdigit()
    )


def assigned(text: bytes, start: int, end: int) -> Place | None:
    """What follows the name of a secret: closely and drawn by chance, or within a few words and very much so."""
    link = _LINK.match(text, end)
    for found in _VALUE.finditer(text, end, end + _REACH + 256):
        first, last = found.span()
        if first > end + _REACH:
            break
        if (equals := text.find(b"=", first, last - 16)) > 0 and _FIELD.match(text, first, equals + 1):
            first = equals + 1
        value = text[first:last]
        close = link is not None and first <= link.end()
        if text[last : last + 1] != b"(" and _random(value) and (close or _mixed(value)):
            return first, last
    return None


def bearer(text: bytes, start: int, end: int) -> Place | None:
    """The value after a scheme of HTTP authentication."""
    first = text.index(b" ", start) + 1
    return (first, end) if _random(text[first:end]) else None


def aws_secret(text: bytes, start: int, end: int) -> Place | None:
    """Forty characters of base64 after a word for them."""
    return (end - 40, end) if not text[end : end + 1].isalnum() and _random(text[end - 40 : end]) else None


# ---- private keys and tokens ----

_ARMOR = re.compile(rb"(?:Proc-Type|DEK-Info|Version|Comment|Hash)[^\r\n\\]*")
_NOT_KEY = re.compile(rb"\\+[rn]|[\s\"'+,>|#]")
_BODY = re.compile(rb"(?:[A-Za-z0-9+/=\s\"',>|:#\-]|\\[rn])*")
_END = re.compile(rb"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_MOST_OF_KEY = 20_000


def key_block(text: bytes, start: int, end: int) -> Place | None:
    """A header that a key follows, not an ellipsis: 32 characters of base64, but for line breaks, also escaped ones."""
    body = _NOT_KEY.sub(b"", _ARMOR.sub(b"", text[end : end + 600]))
    if re.match(rb"[A-Za-z0-9+/=]{32}", body) is None:
        return None
    closed = _END.search(text, end, end + _MOST_OF_KEY)
    if closed is not None:
        return start, closed.end()
    rest = _BODY.match(text, end, end + _MOST_OF_KEY)
    return start, end if rest is None else rest.end()


def jwt(text: bytes, start: int, end: int) -> Place | None:
    """Three parts, of which the first is a JSON object with an algorithm."""
    header = text[start:end].split(b".", 1)[0]
    try:
        decoded = orjson.loads(urlsafe_b64decode(header + b"=" * (-len(header) % 4)))
    except (orjson.JSONDecodeError, binascii.Error):
        return None
    return (start, end) if isinstance(decoded, dict) and "alg" in decoded else None


ROWS = (
    Row(
        "private_key",
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----",
        key_block,
        "PRIVATE KEY",
    ),
    Row("private_key", r"PuTTY-User-Key-File-\d: |AGE-SECRET-KEY-1[0-9A-Z]{58}", whole, "PuTTY-User-Key|AGE-SECRET"),
    Row("private_key", r"(?i)\bPrivateKey\s*=\s*[A-Za-z0-9+/]{43}=", whole, r"(?i)\bPrivateKey"),
    *(Row("api_key", pattern, token, hint) for hint, pattern in _TOKENS),
    Row(
        "api_key",
        r"\b[MNO][A-Za-z0-9_\-]{23,25}\.[A-Za-z0-9_\-]{6}\.[A-Za-z0-9_\-]{27,}",
        token,
        r"\.[A-Za-z0-9_\-]{6}\.[A-Za-z0-9_\-]{20}",
        counts=True,
    ),  # Discord
    Row(
        "api_key",
        r"(?i)(?:aws|secret)[a-z_ .\-]{0,24}(?:key|secret)?[\"']?\s*(?:=>|[:=,]|is|\n)\s*[\"']?[A-Za-z0-9/+]{40}",
        aws_secret,
        r"(?i)aws|secret",
    ),
    Row("api_key", _NAMES, assigned),
    Row("api_key", r"(?i)\b(?:bearer|basic) [A-Za-z0-9_./+=\-~]{20,}", bearer, r"(?i)\b(?:bearer|basic) "),
    Row("api_key", r"[a-z0-9]://[^\s/:@\"'<>]*:[^\s/:@\"'<>]{3}[^\s/:@\"'<>]*@[A-Za-z0-9\[]", in_address, "://"),
    Row(
        "jwt",
        r"\be[wxyz][A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]*",
        jwt,
        r"\be(?:y[A-Z0-9]|[wx][A-Z0-9ko])",
    ),
)
