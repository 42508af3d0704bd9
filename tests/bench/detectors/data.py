"""The labelled data: texts with what they hold, from a seed and a family.

Owns which kinds are drawn how often and in what surroundings. `allowed` are kinds that may be found in a text or not:
a password in an address is also a credential. Refuses to import the detectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from tests.bench.detectors import keys, lookalikes, numbers, people, surroundings, writing

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sample:
    """A text; `kind` is what it was made for, None for a look-alike of the family of look-alikes `family`."""

    text: str
    kind: str | None
    family: str
    allowed: frozenset[str] = NOTHING


@dataclass(frozen=True, slots=True)
class Family:
    """What samples are drawn from."""

    writing: writing.Family
    around: surroundings.Around
    lookalikes: dict[str, Callable[[Random], str]]


FAMILIES = {
    "open": Family(writing.OPEN, surroundings.OPEN, dict(lookalikes.OPEN)),
    "blind": Family(writing.BLIND, surroundings.BLIND, dict(lookalikes.BLIND)),
}
# Countries whose numbers, without a trunk prefix, could be any other number: only with a word for what they are.
_PLAIN = {"es", "pl", "it", "mx", "cn", "tr", "br"}


def _card(chance: Random, family: Family) -> Sample:
    data = writing.joined(chance, family.writing, numbers.card(chance), wide=True, bare=True)
    return _sample(chance, family, "credit_card", data, named=chance.random() < 0.4)


def _iban(chance: Random, family: Family) -> Sample:
    number = numbers.iban(chance)
    number = number.lower() if chance.random() < 0.2 else number
    data = writing.joined(chance, family.writing, numbers.cut(number, *[4] * 8), wide=True, bare=True)
    return _sample(chance, family, "iban", data, named=chance.random() < 0.4)


def _ssn(chance: Random, family: Family) -> Sample:
    groups = numbers.ssn(chance)
    bare = chance.random() < 0.25
    data = (
        writing.disguised(chance, family.writing, "".join(groups))
        if bare
        else writing.joined(chance, family.writing, groups, wide=False, bare=False)
    )
    return _sample(chance, family, "us_ssn", data, named=bare or chance.random() < 0.6)


def _phone(chance: Random, family: Family) -> Sample:
    country = chance.choice(numbers.PHONES)
    if chance.random() < 0.5:
        groups = numbers.phone(chance, chance.choice(country.international))
        code = chance.choice((f"+{country.code}", f"+{country.code}", f"00{country.code}", f"(+{country.code})"))
        joint = "" if len(groups) == 1 else chance.choice((*family.writing.narrow, ""))
        plain = code.startswith("00") and joint == ""
        data = code + (joint or chance.choice(("", " ")) * (not plain)) + joint.join(groups)
    else:
        groups = numbers.phone(chance, chance.choice(country.national))
        joint = chance.choice((*family.writing.narrow, ""))
        plain = joint == "" or country.country in _PLAIN or "\n" in joint
        data = joint.join(groups)
    data = writing.disguised(chance, family.writing, data)
    return _sample(chance, family, "phone", data, named=plain or chance.random() < 0.4)


def _email(chance: Random, family: Family) -> Sample:
    data = people.email(chance)
    draw = chance.random()
    if draw < 0.1:
        data = data.upper()
    elif draw < 0.2:
        data = chance.choice(("<{}>", "mailto:{}", "({})", "Jo <{}>", "`{}`", "**{}**", "'{}'", "{},")).format(data)
    elif draw < 0.26:
        local, _, host = data.partition("@")
        at, dot = chance.choice(
            (
                (" [at] ", " [dot] "),
                ("(at)", "(dot)"),
                (" at ", " dot "),
                (" @ ", "."),
                ("[at]", "."),
                (" (AT) ", " (DOT) "),
            )
        )
        data = f"{local}{at}{dot.join(host.split('.'))}"
    elif draw < 0.3:
        data = data.replace("@", chance.choice(("\uff20", "%40", "\u200b@", "@\u2060")))
    elif draw < 0.34 and data.isascii():
        data = "".join(chr(ord(sign) + 0xFEE0) for sign in data)
    return _sample(chance, family, "email", data, named=chance.random() < 0.4)


def _api_key(chance: Random, family: Family) -> Sample:
    if chance.random() < 0.6:
        return _sample(
            chance, family, "api_key", keys.provider_key(chance), named=chance.random() < 0.5, allowed={"password"}
        )
    key = keys.plain_key(chance)
    if chance.random() < 0.2:
        shape = chance.choice(
            (
                "Authorization: Bearer {}",
                "curl -H 'X-API-Key: {}' https://api.example/v1",
                "aws_secret_access_key = {}",
                "?api_key={}&page=2",
                "AccountKey={};EndpointSuffix=core.windows.net",
            )
        )
        return Sample(shape.format(key), "api_key", "", frozenset({"password"}))
    return _sample(chance, family, "api_key", key, named=True, allowed={"password"})


def _private_key(chance: Random, family: Family) -> Sample:
    return _sample(
        chance, family, "private_key", keys.private_key(chance), named=False, allowed={"api_key", "password"}
    )


def _jwt(chance: Random, family: Family) -> Sample:
    token = keys.json_web_token(chance)
    if chance.random() < 0.4:
        token = chance.choice(
            ("Authorization: Bearer {}", "token={}", "Cookie: session={}; Path=/", '{{"id_token": "{}"}}')
        ).format(token)
    return _sample(chance, family, "jwt", token, named=False, allowed={"api_key", "password"})


_CONNECTIONS = (
    "postgres://app:{}@db.internal:5432/app", "Server=db;Database=app;User Id=sa;Password={};Encrypt=yes", "mysql -u root -p'{}' app", "redis://:{}@cache.internal:6379/0",
    "jdbc:mysql://db/app?user=app&password={}", "amqp://svc:{}@mq.internal/", "MYSQL_ROOT_PASSWORD={}", "spring.datasource.password={}", "https://jo:{}@git.example/org/repo.git", "user: admin\npassword: {}\n",
    "login admin / password {}", "Username: jo\nPassword: {}", "sshpass -p '{}' ssh host", "net use z: password:{}", "<password>{}</password>", 'password="{}"',
)  # fmt: skip


def _password(chance: Random, family: Family) -> Sample:
    secret = keys.password(chance)
    if chance.random() < 0.3:
        shape = chance.choice(_CONNECTIONS)
        return Sample(shape.replace("{}", secret), "password", "", frozenset({"api_key", "email"}))
    return _sample(chance, family, "password", secret, named=True, allowed={"api_key"})


def _ip(chance: Random, family: Family) -> Sample:
    data = chance.choice(("{}", "{}", "{}", "[{}]", "{},", "http://{}/", "from {} port 22")).format(
        people.address(chance)
    )
    return _sample(chance, family, "ip_address", data, named=chance.random() < 0.5)


def _national_id(chance: Random, family: Family) -> Sample:
    identity = chance.choice(numbers.IDENTITIES)
    groups = identity.make(chance)
    data = chance.choice((" ", "", "-")).join(groups) if len(groups) > 1 else groups[0]
    return _sample(
        chance,
        family,
        "national_id",
        data,
        named=True,
        words=identity.words,
        allowed={"phone", "us_ssn", "date_of_birth"},
    )


def _passport(chance: Random, family: Family) -> Sample:
    if chance.random() < 0.5:
        return _sample(chance, family, "passport", people.machine_readable(chance), named=False)
    return _sample(
        chance,
        family,
        "passport",
        people.passport_number(chance),
        named=True,
        allowed={"phone", "us_ssn", "national_id"},
    )


def _birth(chance: Random, family: Family) -> Sample:
    language = chance.choice([name for name in family.around.named if name in surroundings.WORDS["date_of_birth"]])
    word = chance.choice(surroundings.WORDS["date_of_birth"][language])
    shape = chance.choice(
        ("{}: {}", "{} {}", "{} {}.", "{} : {}", "({} {})", "Name: Jo\n{}: {}\n", "Jo Doe, {} {}, Leeds")
    )
    return Sample(shape.format(word, people.birth_date(chance, language)), "date_of_birth", "")


def _street(chance: Random, family: Family) -> Sample:
    language = chance.choice(list(people.STREETS))
    data = people.street(chance, language)
    word = chance.choice(surroundings.WORDS["street_address"][language])
    shape = chance.choice(
        ("{0}: {1}", "{0} {1}", "{1}", "Jo Doe\n{1}\n", "ship to {1}", "I live at {1}.", '"{0}": "{1}"')
    )
    return Sample(shape.format(word, data), "street_address", "")


_MAKERS: dict[str, Callable[[Random, Family], Sample]] = {
    "credit_card": _card, "iban": _iban, "us_ssn": _ssn, "api_key": _api_key, "private_key": _private_key, "jwt": _jwt, "password": _password,
    "email": _email, "phone": _phone, "ip_address": _ip, "national_id": _national_id, "passport": _passport, "date_of_birth": _birth, "street_address": _street,
}  # fmt: skip
KINDS = tuple(_MAKERS)


def _sample(
    chance: Random,
    family: Family,
    kind: str,
    data: str,
    *,
    named: bool,
    words: tuple[str, ...] = (),
    allowed: set[str] | None = None,
) -> Sample:
    text = surroundings.around(chance, family.around, kind, data, named=named, words=words)
    return Sample(text, kind, "", frozenset(allowed or ()))


def samples(family: str, seed: int, each: int) -> Iterator[Sample]:
    """`each` texts of every kind, and four times as many look-alikes, the same for the same arguments."""
    made = FAMILIES[family]
    for kind, make in _MAKERS.items():
        chance = Random(f"{family} {kind} {seed}")
        for _ in range(each):
            yield make(chance, made)
    for name, look in made.lookalikes.items():
        chance = Random(f"{family} {name} {seed}")
        for _ in range(4 * each // len(made.lookalikes)):
            text = look(chance)
            if chance.random() < 0.4:
                text = surroundings.around(chance, made.around, "", text, named=False)
            yield Sample(text, None, name)
