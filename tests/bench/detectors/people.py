"""What belongs to people and is no number: e-mail addresses, streets, dates of birth, passports; and IP addresses.

Owns names and places of several languages. Refuses to know how they stand in a sentence (`surroundings.py`).
"""

from __future__ import annotations

import datetime
from ipaddress import IPv6Address
from random import Random

from tests.bench.detectors.numbers import LETTERS, digits

FIRST = (
    "anna", "ben", "chloe", "david", "elif", "farid", "giulia", "henrik", "ines", "jan", "katarzyna", "liam", "mei",
    "nikos", "olga", "pedro", "quinn", "ravi", "sofia", "tom", "ursula", "viktor", "wen", "yuki", "zoe",
)  # fmt: skip
LAST = (
    "andersson", "becker", "costa", "dubois", "evans", "ferrari", "garcia", "horvath", "ivanova", "jensen", "kowalski",
    "lopez", "meyer", "nguyen", "obrien", "petrov", "rossi", "schmidt", "tanaka", "usman", "virtanen", "wang", "yilmaz",
)  # fmt: skip
_HOSTS = (
    "gmail.com", "outlook.com", "web.de", "gmx.net", "orange.fr", "libero.it", "wp.pl", "mail.ru", "qq.com", "163.com",
    "yahoo.co.jp", "uol.com.br", "firma-nord.de", "cs.uni-example.edu", "mail.corp.example.co.uk", "startup.io",
    "museum.museum", "city.gov", "hospital.health", "xn--mnchen-3ya.de", "shop.online", "example.photography",
)  # fmt: skip
_WIDE_HOSTS = ("müller-bau.de", "例え.jp", "почта.рф", "señor.es", "société.fr")


def email(chance: Random) -> str:
    """An address as it is typed."""
    first, last = chance.choice(FIRST), chance.choice(LAST)
    number = digits(chance, chance.choice((0, 0, 0, 2, 4)))
    local = chance.choice(
        (f"{first}.{last}{number}", f"{first[0]}{last}{number}", f"{last}_{first}", f"{first}-{last}", f"{first}{number or 7}",
         f"{first}.{last}+{chance.choice(('news', 'shop1', 'x'))}", f"{first}_{number}", f"{first[0]}.{last}", "o'" + last, f"{digits(chance, 9)}")
    )  # fmt: skip
    host = chance.choice(_WIDE_HOSTS if chance.random() < 0.05 else _HOSTS)
    return f"{local}@{host}"


STREETS: dict[str, tuple[str, ...]] = {
    "en": ("{n} {name} Street, {city}, {state} {zip5}", "{n} {name} Ave, Apt {unit}, {city}, {state} {zip5}", "{n} N {name} Blvd., Suite {unit}, {city} {state} {zip5}", "{n} {name} Road, London {post}"),
    "de": ("{name}straße {n}, {zip5} {city}", "{name}weg {n}a, {zip5} {city}", "{name}str. {n}, {zip5} {city}", "Am {name}platz {n}, {zip5} {city}"),
    "fr": ("{n} rue {name}, {zip5} {city}", "{n} bis avenue {name}, {zip5} {city}", "{n}, boulevard {name}, {zip5} {city}"),
    "es": ("Calle {name} {n}, {zip5} {city}", "Avenida {name}, {n}, {zip5} {city}", "C/ {name}, {n}, 2º B, {zip5} {city}"),
    "it": ("Via {name} {n}, {zip5} {city}", "Piazza {name} {n}, {zip5} {city}"),
    "nl": ("{name}straat {n}, {zip4} AB {city}", "{name}laan {n}, {zip4} XK {city}"),
    "pl": ("ul. {name} {n}/{unit}, 00-{zip3} {city}",),
    "pt": ("Rua {name}, {n}, {zip4}-{zip3} {city}", "Avenida {name} {n}, {city}"),
}  # fmt: skip
_NAMES = (
    "Maple",
    "Linden",
    "Victor",
    "Garibaldi",
    "Mozart",
    "Colon",
    "Berlin",
    "Church",
    "Roma",
    "Schiller",
    "Verdi",
    "Lincoln",
)
_CITIES = ("Springfield", "Hamburg", "Lyon", "Sevilla", "Torino", "Utrecht", "Warszawa", "Porto", "Denver", "Leeds")


def street(chance: Random, language: str) -> str:
    """An address in the way of a country where the language is spoken."""
    shape = chance.choice(STREETS[language])
    return shape.format(
        n=chance.randint(1, 2400 if language == "en" else 190), name=chance.choice(_NAMES), city=chance.choice(_CITIES),
        state=chance.choice(("IL", "CA", "TX", "NY", "WA")), unit=chance.randint(1, 40), zip5=digits(chance, 5, "123456789"),
        zip4=digits(chance, 4, "123456789"), zip3=digits(chance, 3), post="SW1A 2AA",
    )  # fmt: skip


_MONTHS = {
    "en": ("January", "Feb", "March", "April", "May", "June", "Jul", "August", "September", "Oct", "November", "December"),
    "de": ("Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November", "Dezember"),
    "fr": ("janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre", "novembre", "décembre"),
    "es": ("enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre", "octubre", "noviembre", "diciembre"),
}  # fmt: skip


def birth_date(chance: Random, language: str) -> str:
    """A day within the last hundred years, as it is written where the language is spoken."""
    day = datetime.date(1930, 1, 1) + datetime.timedelta(days=chance.randrange(85 * 365))
    month = _MONTHS.get(language, _MONTHS["en"])[day.month - 1]
    return chance.choice(
        (f"{day:%d.%m.%Y}", f"{day:%d/%m/%Y}", f"{day:%Y-%m-%d}", f"{day:%d-%m-%y}", f"{day.day}.{day.month}.{day.year}",
         f"{day.day}. {month} {day.year}" if language == "de" else f"{day.day} {month} {day.year}",
         f"{month} {day.day}, {day.year}" if language == "en" else f"{day.day} de {month} de {day.year}" if language == "es" else f"{day.day} {month} {day.year}")
    )  # fmt: skip


def _check(text: str) -> str:
    """A check digit of ICAO 9303, part 3: weights 7, 3, 1; letters count from ten."""
    values = (0 if sign == "<" else int(sign) if sign.isdigit() else LETTERS.index(sign) + 10 for sign in text)
    return str(sum(value * (7, 3, 1)[place % 3] for place, value in enumerate(values)) % 10)


def machine_readable(chance: Random) -> str:
    """The two lines of a passport, or the three of an identity card."""
    state = chance.choice(("D<<", "FRA", "GBR", "USA", "ITA", "ESP", "POL", "NLD"))
    name = f"{chance.choice(LAST)}<<{chance.choice(FIRST)}".upper()
    number = "".join(chance.choices("CFGHJKLMNPRTVWXYZ0123456789", k=9))
    born, until = (
        f"{chance.randint(40, 99)}0{chance.randint(1, 9)}{chance.randint(10, 28)}",
        f"3{chance.randint(0, 5)}1{chance.randint(0, 2)}{chance.randint(10, 28)}",
    )
    sex = chance.choice("MF<")
    numbered, dated, ended = number + _check(number), born + _check(born), until + _check(until)
    if chance.random() < 0.7:
        optional = "<" * 14
        whole = numbered + dated + ended + optional + _check(optional)
        return f"{f'P<{state}{name}':<<44}\n{numbered}{state}{dated}{sex}{ended}{optional}{_check(optional)}{_check(whole)}"
    first = f"I<{state}{numbered}{'<' * 15}"
    second = f"{dated}{sex}{ended}{state}{'<' * 11}"
    return f"{first}\n{second}{_check(first[5:30] + dated + ended + '<' * 11)}\n{name:<<30}"


def passport_number(chance: Random) -> str:
    """A passport's number in the form of one country or another."""
    return chance.choice(
        (lambda: "C" + "".join(chance.choices("CFGHJKLMNPRTVWXYZ0123456789", k=8)), lambda: digits(chance, 9),
         lambda: chance.choice(LETTERS) + digits(chance, 8), lambda: digits(chance, 2) + "".join(chance.choices(LETTERS, k=2)) + digits(chance, 5),
         lambda: "".join(chance.choices(LETTERS, k=2)) + digits(chance, 7), lambda: "".join(chance.choices(LETTERS, k=3)) + digits(chance, 6))
    )()  # fmt: skip


def address(chance: Random) -> str:
    """An IPv4 or IPv6 address, public or private."""
    if chance.random() < 0.6:
        first = chance.choice((10, 172, 192, chance.randint(11, 223)))
        rest = {10: (chance.randint(0, 255),), 172: (chance.randint(16, 31),), 192: (168,)}.get(
            first, (chance.randint(0, 255),)
        )
        return ".".join(map(str, (first, *rest, chance.randint(0, 255), chance.randint(1, 254))))
    start = chance.choice((0x2001_0DB8, 0x2A02_8108, 0xFE80_0000, 0xFD12_3456, 0x2606_4700))
    bits = start << 96 | chance.choice((chance.getrandbits(16), chance.getrandbits(64), chance.getrandbits(96)))
    written = IPv6Address(bits)
    return chance.choice((str(written), written.exploded, str(written).upper()))
