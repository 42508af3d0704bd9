"""Which kinds a scan finds, which look-alikes it leaves, and that it reads whatever text there is."""

from __future__ import annotations

import re
import time
from base64 import urlsafe_b64encode

import pytest
import re2
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.automaton import occurs, searcher
from gateway.detectors import ROWS
from gateway.detectors.accounts import is_iban
from gateway.detectors.base import Row, Seen
from gateway.detectors.cards import is_card
from gateway.detectors.credentials import token
from gateway.detectors.numbers import (
    DIGIT_KINDS,
    IDENTITY_WORD,
    LIKELY,
    PHONE,
    PHONE_WORD,
    RUN,
    SOCIAL_WORD,
    Numbers,
)
from gateway.fold import CHANGES, Aligned, folded
from gateway.labels import KINDS, MOST_WORK, WORK_OF_CANDIDATE, Scanner, Span, pattern_problem, placeholder

SCANNER = Scanner(KINDS)

KEY = (
    "MIIEpAIBAAKCAQEA7bq0Zt1v9mJ3xkQw2nVfYhL8sGcR5dTe4uPzXo6aWiBjKmN0\n"
    "q2r8sT4vYxZ1aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789\n"
)


def part(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


CLAIMS = part('{"sub":"42"}')
JWT = part('{"alg":"HS256","typ":"JWT"}') + f".{CLAIMS}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"

# A published example of each, or one of no person.
NATIONAL = (
    "Steuer-ID 86 095 742 719",
    "86095742719",
    "DNI 12345678Z",
    "x1234567l",
    "RSSMRA85T10A562S",
    "NIR 2 55 08 14 168 025 38",
    "255081416802538",
    "BSN: 111222333",
    "PESEL 44051401359",
    "personnummer 811218-9876",
    "19811218-9876",
    "131052-308T",
    "85.07.30-033.28",
    "NIF 501964843",
    "529.982.247-25",
    "CPF 52998224725",
    "Aadhaar 2341 2341 2346",
    "11010519491231002X",
    "NHS number 943 476 5919",
    "SIN 046 454 286",
    "756.9217.0769.85",
    "TC Kimlik 10000000146",
    "fødselsnummer 15108695088",
    "CNP 1800101221144",
    "ΑΜΚΑ 01013099997",
    "isikukood 37605030299",
    "OIB 33392005961",
    "710319/2745",
    "ЕГН 7523169263",
    "971013-9019902",
    "マイナンバー 1234 5678 9018",
    "SA ID 7503305044089",
    "1-2345-45678-78-1",
    "TFN 123 456 782",
    "20-05536168-2",
    "СНИЛС 112-233-445 95",
    "ИНН 500100732259",
    "SVNR 1237 010180",
    "BOXW310820HNERXN09",
    "S1234567D",
    "A123456(3)",
    "12.531.909-2",
    "PPS 6433435F",
    "pps.6433435OA",
    "PPS\n6433435F",
    "AB 12 34 56 C",
)

FOUND = [
    *(
        ("email", text)
        for text in (
            "write to alice@example.com please",
            "Alice.B+tag@mail.example.co.uk",
            "<bob_o'neil@firma-x.de>",
            "ALICE@EXAMPLE.COM.",
            "mailto:alice%40example.com",
            "alice [at] example [dot] com",
            "alice(at)example.com",
            "alice at example dot com",
            "alice @ example.com",
            "ａｌｉｃｅ＠ｅｘａｍｐｌｅ．ｃｏｍ",
            "jürgen@müller.de",
            "ali\u200bce@exam\u200bple.com",
        )
    ),
    *(
        ("phone", text)
        for text in (
            "+1 415 555 2671",
            "+1 (415) 555-2671",
            "+14155552671",
            "tel:+49-30-901820",
            "+49 (0)30 901820",
            "+44 20 7946 0958",
            "+33 1 42 68 53 00",
            "+٤٩ ٣٠ ٩٠١٨٢٠",
            "0049 30 901820",
            "(415) 555-2671",
            "415-555-2671",
            "415.555.2671",
            "1-415-555-2671",
            "my number is 415 555 2671, thanks",
            "415‑555‑2671",
            "030 901820 12",
            "089/12345678",
            "020 7946 0958",
            "07700 900123",
            "01 42 68 53 00",
            "(11) 91234-5678",
            "call me at 4155552671",
            "phone: 5552671",
            '{"mobile": "9876543210"}',
            "Tel. 30901820",
            "téléphone 0142685300",
            "WhatsApp 98765 43210",
            "Ph. No. 98765 43210",
            "Mob: 98765 43210",
            "4155552671 (cell)",
            "0612345678 [work mobile]",
            "415/555-2671",
        )
    ),
    *(
        ("credit_card", text)
        for text in (
            "4111111111111111",
            "4111 1111 1111 1111",
            "4111-1111-1111-1111",
            "4111 - 1111 - 1111 - 1111",
            "4111.1111.1111.1111",
            "4111  1111  1111  1111",
            "4111 1111\n1111 1111",
            "41111111\n11111111",
            "4111 1111 11\n11 1111",
            "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
            "４１１１　１１１１　１１１１　１１１１",
            "٤١١١ ١١١١ ١١١١ ١١١١",
            "\U0001e954\U0001e951\U0001e951\U0001e951 1111 1111 1111",
            "4111\u00a01111\u00a01111\u00a01111",
            "4111–1111–1111–1111",
            "41\u200b11 1111 1111 11\u200b11",
            "4\u03321\u03321\u03321\u0332 1111 1111 1111",
            "4\u03011\u03011\u030111111\u036311111111",
            "4\ufe0f\u20e31\ufe0f\u20e31\ufe0f\u20e31\ufe0f\u20e3 1111 1111 1111",
            "card 4111111111111111, exp 12/29, cvv 123",
            "12 4111 1111 1111 1111 999",
            "378282246310005",
            "3782 822463 10005",
            "5555 5555 5555 4444",
            "2223003122003222",
            "6011111111111117",
            "3530111333300000",
            "30569309025904",
            "6304 0000 0000 0000",
            "visa 4222222222222",
        )
    ),
    *(
        ("iban", text)
        for text in (
            "DE89370400440532013000",
            "DE89 3704 0044 0532 0130 00",
            "DE89 3704 0044 0532 0130 00 and then some words",
            "de89-3704-0044-0532-0130-00",
            "DE89.3704.0044.0532.0130.00",
            "DE89 3704 0044\n0532 0130 00",
            "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
            "IBAN:GB82WEST12345698765432.",
            "GB82 West 1234 5698 7654 32",
            "FR14 2004 1010 0505 0001 3M02 606",
            "NO93 8601 1117 947",
            "AT61 1904 3002 3457 3201, BIC",
            "to AT12 DE89 3704 0044 0532 0130 00",
            "DE8\n9370400440532013000",
            "DE 8\n9 3704 0044 0532 0130 00",
            "GB 82 WEST 1234 5698 7654 32",
            "IT 60 X 05428 11101 000000123456",
            "IBANDE89370400440532013000",
            "DE8<B>9370400440532013000",
            "DE89<BR>3704 0044 0532 0130 00",
        )
    ),
    *(
        ("us_ssn", text)
        for text in (
            "078-05-1120",
            "my ssn is 078051120",
            "SSN: 078 05 1120",
            "078 05 1120",
            "078.05.1120",
            "078 - 05 - 1120",
            "078‐05‐1120",
            "social security number\n078051120",
            '{"ssn": "219-09-9998"}',
            "12345678 ---------- 078-05-1120",
            "０７８－０５－１１２０",
        )
    ),
    *(
        ("api_key", text)
        for text in (
            "EAAA-x7Q_2kLm9Zp4Rt8Vw1Yb6Nc3Hd5Jf0GsKqPzXe7Ua2TiOo9Lr4Mn8Bv1Cx6Wy3",
            "sk-proj-Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXy4z",
            "sk-ant-api03-Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXy4z-AbCdEf",
            "OPENAI_API_KEY=sk-Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXy4zAb3dEf6h",
            "AKIAQYLPMN5HHHFPZAM2",
            "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",
            "csk-ab3def6hij9klm2nop5qrs8tuv1wxy4zab3def6hij9klm2n",
            "AQ.Ab8RN6JkLmNoPqRsTuVwXyZ0123456789aBcDeFgHiJkLmNoPqR",
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYzq9TqL0m3R",
            "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
            "github_pat_11ABCDEFG0aBcDeFgHiJkL_MnOpQrStUvWxYz0123456789aBcD",
            "AIzaSyDaGmWKa4JsXZ-HjGw7ISLn_3namBGewQe",
            "xoxb-263594206564-2343594206574-FGqddMF8t08v8N7Oq4i57vs1",
            "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
            "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
            "hg-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789AbCdEfG",
            "glpat-zY9x8W7v6U5t4S3r2Q1p",
            "npm_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
            "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",
            'api_key = "q8Zt1v9mJ3xkQw2nVfYhL8sGcR5d"',
            "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq",
            "Authorization: Bearer q8Zt1v9mJ3xkQw2nVfYhL8sGcR5d",
            "postgres://admin:hunter2x@db.internal:5432/app",
            '{"client_secret": "q8Zt1v9mJ3xkQw2nVfYhL8sGcR5d"}',
        )
    ),
    *(
        ("private_key", text)
        for text in (
            f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}-----END RSA PRIVATE KEY-----",
            f"-----BEGIN OPENSSH PRIVATE KEY-----\r\n{KEY}",
            f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n{KEY}",
            '"private_key": "-----BEGIN PRIVATE KEY-----\\n' + KEY.replace("\n", "\\n") + '"',
            f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A\n\n{KEY}",
            "PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=",
        )
    ),
    *(
        ("password", text)
        for text in (
            "password: hunter2",
            "Passwort: Sommer2024!",
            "mon mot de passe est S0leil!99",
            "пароль: qwerty123",
            "密码：abc12345",
            'DB_PASSWORD="s3cr3t-pa55"',
            "Server=db;User Id=sa;Password=pa$$W0rd;Encrypt=yes",
            "<password>Tr0ub4dor&3</password>",
            "login admin / password Winter2023",
            "postgres://admin:hunter2x@db.internal:5432/app",
            "redis://:p@ss@cache:6379/0",
            "mysql -u root -p's3cretPa55' app",
            "The password on file (Winter2023) is wrong",
            "“the wifi password is CoffeeTime2024”",
            "„Passwort: swordFish“",
            '{"password": "sunshine"}',
        )
    ),
    *(
        ("ip_address", text)
        for text in (
            "192.168.100.200:8080",
            "from 203.0.113.9 port 22",
            "http://10.0.0.1/admin",
            "[2001:db8::8a2e:370:7334]",
            "fe80::1ff:fe23:4567:890a",
            "2001:0DB8:0000:0000:0000:8A2E:0370:7334",
            "ping 8.8.8.8",
        )
    ),
    *(
        ("date_of_birth", text)
        for text in (
            "date of birth: 12/03/1980",
            "DOB 1980-03-12",
            "geb. am 12. März 1980",
            "né le 1er mars 1980",
            "fecha de nacimiento: 12 de marzo de 1980",
            "born on March 12th, 1980",
            "生年月日：1980年3月12日",
            '{"birth_date": "19800312"}',
        )
    ),
    *(
        ("passport", text)
        for text in (
            "P<UTOERIKSSON<<ANNA<MARIA<<<<<<<<<<<<<<<<<<<\nL898902C36UTO7408122F1204159ZE184226B<<<<<10",
            "I<UTOD231458907<<<<<<<<<<<<<<<\n7408122F1204159UTO<<<<<<<<<<<6\nERIKSSON<<ANNA<MARIA<<<<<<<<<<",
            "passport number: C01X00T47",
            "Reisepass Nr. C01X00T47",
            "my passport no is 123456789",
        )
    ),
    *(
        ("street_address", text)
        for text in (
            "742 Evergreen Terrace, Springfield",
            "12 main street, springfield, il 62704",
            "Lindenstraße 12, 10969 Berlin",
            "10 rue de la Paix, 75002 Paris",
            "Calle de Alcalá, 48, Madrid",
            "Via Garibaldi 12",
            "Keizersgracht 123, Amsterdam",
            "C/Mayor, 12, Madrid",
            "c/Gran Vía 12",
            "Av.Paulista 1000",
            "Carrera 7 # 12-34",
            "7 Malá Street",
            "12 main street,  springfield, il 62704",
            "ул. Ленина 5",
            "ul. Marszałkowska 10/4, Warszawa",
            "ul.Marszałkowska 10",
        )
    ),
    *(("national_id", text) for text in NATIONAL),
    ("jwt", JWT),
    ("jwt", f"Authorization: Bearer {JWT}"),
    ("jwt", part('{ "typ": "JWT", "alg": "none" }') + f".{CLAIMS}."),
]

LEFT = [
    "Order 4111111111111112 was sent.",  # a wrong check digit
    "order no. 0123-456789",
    "Ticket 415-555-2671 is closed",
    "ISBN 978-3-16-148410-0 and ISBN 0-306-40615-2",
    "550e8400-e29b-41d4-a716-446655440000",
    "d41d8cd98f00b204e9800998ecf8427e",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "version 1.2.3, build 20240115.4, v10.15.7",
    "2024-01-15T10:20:30.123456Z 1705314030 1705314030123",
    "01-02-2024 and 01.02.2024 and 01/02/24 10:20",
    "127.0.0.1:8080 and 0.0.0.0, ::1, 255.255.255.0",
    "version 10.4.2.1, Chrome/12.0.3.4, OID 1.3.6.1.4.1.311, v1.2.3.4",
    "10:20:30 and 00:1b:44:11:3a:b7 and std::vector<a::b>",
    "password = os.environ['DB_PASSWORD'], password: str = Field(min_length=8)",
    "The password must have 12 characters; password: required, Password: ********, pwd=$(pwd)",
    "He was born in 1984. Released on 12.03.1999. date of birth: unknown",
    "A passport is required. Passport control is on level 2. compass 123456789",
    "PESEL 44051401358, BSN 123456789, Steuer-ID 86095742710, CPF 529.982.247-24",  # wrong check digits
    "order 44051401359 and 123456782",  # right ones that nothing names
    "Wall Street fell 3 percent; he walked 5 streets; via email 24",
    "pH 7.40 7.35 7.45 and 12345678 mobile users",
    "100\t20\t3000\t5",
    "pi is 3.14159265358979323846, e is 2.71828182845904523536",
    "[0.4539278474823712, 0.5123839374737373, 0.6011111111111117]",
    "DE88 3704 0044 0532 0130 00",  # a wrong check digit
    "is 20 minutes enough, or at 12 oclock",
    "BE0 and AT12345678901234567890123",
    "DE8&9b370400440532013000",
    "DE8<2b>9370400440532013000",
    "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000",
    "serial 123456789",
    "123-45-67890 and 1123-45-6789",
    "@decorator\nx = a@b.T\ny = q@k.transpose(-2, -1)",
    "npm i @scope/pkg@1.2.3, icon@2x.png",
    "git clone git@github.com:org/repo.git",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    'api_key = "your_api_key_goes_here_1"',
    "api_key = os.environ['OPENAI_API_KEY']",
    "OPENAI_API_KEY=sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "the token is authentication_required_for_all",
    "password: correct-horse-battery-staple",
    "sk-learn and risk-assessment-of-the-whole-operation",
    "postgres://user:password@db.example/app"[:22],
    "eyJub3QiOiJhIHRva2VuIn0.abcdefghij.klmnop",  # no alg
    "Boston, MA 02110-1301, USA",
    "x**2 + 98172488 and 7*y + 30.9087533",
    "Proc. pp. 573-583. 2020.",
    "'01234.000000'",
    "iPhone 15, screen 1920 1080, phone 7",
    "+0200 and 1+12345678 and 2024+10",
    "for i in range(1000000, 2000000): total += 12345678",
    "Smith et al. 2019, and via 12 hops",
    "os.open(path, os.O_CREAT, 384) in C/Fortran 90, /c/Users 12",
    "The quick brown fox jumps over 13 lazy dogs in 2024, for 35.50 euros.",
    "",
]


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_finds_a_kind_however_it_is_written(kind: str, text: str) -> None:
    """Separators, line breaks, other digits, dashes and invisible characters hide nothing."""
    assert kind in SCANNER.scan([text])
    assert kind in SCANNER.scan(["Look:", f"before {text} after"])


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ("credit_card", "1. 4111111111111111\n2. 5555555555554444"),
        ("phone", "1. 415-555-2671"),
        ("phone", "1) 03-5924-3987"),
        ("phone", "12\t0171 2345678\t13"),
        ("credit_card", "4111\t1111\t1111\t1111\t12/29"),
        ("phone", "12. 030 901820 12"),
        ("phone", "3 - 415-555-2671 - 2"),
        ("phone", "Call (415) 555 2671. 12 people wait."),
        ("phone", "138 1234 5678. 3"),
        ("us_ssn", "1 - 078-05-1120"),
        ("us_ssn", "My SSN is 078.05.1120. 12 of us"),
        ("us_ssn", "It is 078 05 1120. 12 of us"),
        ("national_id", "529.982.247-25. 123-456"),
        ("credit_card phone", "4111 1111 1111 1111, 415-555-2671"),
        ("credit_card us_ssn", "30569309025904 | 078.05.1120"),
        ("credit_card national_id", "4111111111111111; 710319/2745"),
        ("us_ssn national_id", "078-05-1120\t20-05536168-2"),
        ("us_ssn phone", "078-05-1120 (415) 555-2671"),
        ("ip_address credit_card", "203.0.113.9 4111 1111 1111 1111"),
        ("ip_address us_ssn phone", "203.0.113.9, 078-05-1120, 030 901820 12"),
        ("iban credit_card", "DE89370400440532013000 4111111111111111"),
    ],
)
def test_a_number_is_found_beside_another(kinds: str, text: str) -> None:
    """What numbers a list, ends a sentence or stands in the next column takes nothing from it."""
    assert SCANNER.scan([text]) == set(kinds.split())


@pytest.mark.parametrize("text", LEFT)
def test_leaves_what_only_looks_like_it(text: str) -> None:
    """Wrong check digits, order numbers, ISBNs, hashes, dates, versions, code and placeholders carry no label."""
    assert SCANNER.scan([text]) == frozenset()


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("credit_card", ["the card is 4111 1111", "1111 1111, thanks"]),
        ("credit_card", ["41111111111", "11111"]),
        ("iban", ["DE89 3704 0044", "0532 0130 00"]),
        ("us_ssn", ["ssn", "078051120"]),
        ("phone", ["phone", "4155552671"]),
    ],
)
def test_reads_neighbouring_texts_as_one(kind: str, texts: list[str]) -> None:
    """A number that is split over two strings of a body is found."""
    assert kind in SCANNER.scan(texts)
    assert all(kind not in SCANNER.scan([text]) for text in texts)


def test_answers_for_the_kinds_it_was_built_for() -> None:
    """A scanner says nothing of kinds that a policy does not ask for."""
    text = "alice@example.com 4111 1111 1111 1111"
    assert Scanner({"email"}).scan([text]) == {"email"}
    assert Scanner({"credit_card"}).scan([text]) == {"credit_card"}
    assert Scanner(()).scan([text]) == frozenset()
    assert SCANNER.scan([text]) == {"email", "credit_card"}
    assert SCANNER.scan([]) == frozenset()


def test_refuses_a_kind_without_a_detector() -> None:
    """A misspelt kind is an error at load, not a detector that never fires."""
    with pytest.raises(ValueError, match="no detector for emial; there are api_key, "):
        Scanner({"emial", "email"})


DIGITS = st.text("0123456789", min_size=11, max_size=18)
SURROUNDINGS = st.text(st.characters(exclude_categories=["Nd", "Cs"]), max_size=40).map(lambda text: f"{text}, ")


@settings(deadline=None)
@given(
    DIGITS,
    st.sampled_from(["4", "51", "2221", "34", "6011", "3530", "62"]),
    st.sampled_from(["", " ", "-", " - ", ".", "\n"]),
    SURROUNDINGS,
)
def test_finds_every_valid_card(digits: str, prefix: str, gap: str, around: str) -> None:
    """A number with an issuer's prefix and length and a right check digit is found in any surroundings."""
    wanted = 15 if prefix == "34" else 16
    body = (prefix + digits.ljust(18, "7"))[: wanted - 1]
    number = next(body + check for check in "0123456789" if luhn_by_the_book(body + check))
    sizes = (4, 6, 5) if wanted == 15 else (4, 4, 4, 4)
    groups = [number[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    assert is_card(number.encode())
    assert "credit_card" in SCANNER.scan([f"{around}{gap.join(groups)}; {around}"])


def luhn_by_the_book(number: str) -> bool:
    """Luhn's rule in another form than the code's: doubled digits are replaced by the sum of their digits."""
    doubled = [int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(reversed(number))]
    return sum(value // 10 + value % 10 for value in doubled) % 10 == 0


@settings(deadline=None)
@given(st.text("0123456789", min_size=18, max_size=18), st.sampled_from(["", " ", "-", "\n"]), SURROUNDINGS)
def test_finds_every_valid_iban(account: str, gap: str, around: str) -> None:
    """A German account number with its two check digits is found in any surroundings."""
    check = 98 - int(account + "131400") % 97  # D is 13, E is 14
    number = f"DE{check:02d}{account}"
    assert is_iban(number)
    assert "iban" in SCANNER.scan([around, gap.join(number[i : i + 4] for i in range(0, 22, 4)) + "; " + around])


@settings(deadline=None)
@given(st.integers(1, 899).filter(lambda area: area != 666), st.integers(1, 99), st.integers(1, 9999), SURROUNDINGS)
def test_finds_every_valid_ssn(area: int, group: int, serial: int, around: str) -> None:
    """A number that the Social Security Administration could have issued is found in any surroundings."""
    assert "us_ssn" in SCANNER.scan([f"{around}{area:03d}-{group:02d}-{serial:04d}; {around}"])


DIGITS_ALONE = Scanner(DIGIT_KINDS)
GROUPS = st.lists(
    st.one_of(
        st.integers(1, 8).flatmap(lambda size: st.text("0123456789", min_size=size, max_size=size)),
        st.sampled_from(["4111", "1111", "078", "05", "1120", "030", "415", "555", "2671", "86095742719"]),
        st.sampled_from(
            [" ", " ", "-", ".", "/", "\n", " (", ") ", "+", ", ", "<b>", "&nbsp;", "x", " ssn ", "phone "]
        ),
        st.integers(7, 10).map(lambda count: "-" * count),
    ),
    max_size=14,
)


@settings(deadline=None)
@given(GROUPS)
def test_numbers_are_found_without_looking_where_no_hint_is(pieces: list[str]) -> None:
    """What the automaton does not point at holds none: looking at every run of digits finds no more than a scan."""
    text = "".join(pieces)
    seen = Seen(MOST_WORK, RUN | LIKELY | PHONE | PHONE_WORD | SOCIAL_WORD | IDENTITY_WORD)
    Numbers(DIGIT_KINDS).find(text.encode(), seen)
    assert seen.kinds == DIGITS_ALONE.scan([text])


BROKEN = st.tuples(
    st.sampled_from([text for _, text in FOUND]),
    st.floats(0, 1),
    st.sampled_from(
        ["", " ", "\n", "\v", "\x00", "\x1c", ".", "-", ",", "<b>", "&nbsp;", "\\n", "0", "a", "É", "ß", "字"]
    ),
).map(lambda drawn: drawn[0][: int(drawn[1] * len(drawn[0]))] + drawn[2] + drawn[0][int(drawn[1] * len(drawn[0])) :])


def found_by(row: Row, text: bytes) -> bool:
    """Whether a row finds something, be there a hint or not."""
    search, at = searcher(row.pattern), 0
    while True:
        start, end = search(text, at, len(text))[0]
        if start < 0 or row.check(text, start, end):
            return start >= 0
        at = start + 1 if row.overlaps else max(end, start + 1)


@settings(deadline=None)
@given(BROKEN)
def test_words_are_found_without_looking_where_no_hint_is(text: str) -> None:
    """No hint fires less than its pattern does, and no check fails, however a text is broken."""
    read = folded(text).encode(errors="replace")
    kinds = {row.kind for row in ROWS if found_by(row, read)}
    found = SCANNER.scan([text])
    assert kinds <= found
    assert found - DIGIT_KINDS <= kinds


KEYS = [row for row in ROWS if row.check is token]


@pytest.mark.parametrize("row", KEYS, ids=lambda row: row.hint)
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_hint_of_a_provider_fires_for_its_keys(row: Row, data: st.DataObject) -> None:
    key = data.draw(st.from_regex(re.compile(row.pattern, re.ASCII), fullmatch=True))
    assert occurs(row.hint or row.pattern)(key.encode())


@pytest.mark.parametrize("text", ["token=" + JWT, "https://jo:Anchor!Orange29@git.example/org/repo.git"])
def test_what_several_kinds_claim_is_always_called_by_the_same_one(text: str) -> None:
    """Whatever else there is in the text, and in whatever order."""
    names = {span.kind for around in ("{}", "{} -----", "key: {}") for span in SCANNER.spans(around.format(text)) or ()}
    assert len(names) == 1


@settings(deadline=None)
@given(st.lists(st.text(st.characters()), max_size=5))
def test_reads_any_text(texts: list[str]) -> None:
    """No string makes a scan raise, lone surrogates included, and the answer is a set of known kinds."""
    assert SCANNER.scan(texts) <= KINDS


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"PRJ-\d{4}", None),
        ("(?i)größe", None),
        ("(ab", "is refused by RE2: missing ): (ab"),
        ("(?=a)", "is refused by RE2: invalid perl operator: (?="),
        ("(a{1000}){1000}", "is refused by RE2: invalid repetition size: {1000}"),
        (r"\pL{900}", "is refused by RE2: pattern too large - compile failed"),
        ("a*", "matches the empty string, so it would be found in every text"),
        (r"\b", "matches the empty string, so it would be found in every text"),
        ("(?m)$", "matches the empty string, so it would be found in every text"),
        ("", "matches the empty string, so it would be found in every text"),
        (
            "a–b",
            "holds characters that texts are rid of before they are searched: write dashes as -, digits as 0 to 9, and "
            "letters without typographic forms or invisible characters",
        ),
    ],
)
def test_says_why_a_pattern_cannot_be_used(pattern: str, problem: str | None) -> None:
    """What RE2 refuses, what every text holds and what no text can hold is no pattern."""
    assert pattern_problem(pattern) == problem
    if problem is None:
        Scanner({"own"}, {"own": pattern})
    else:
        with pytest.raises(ValueError, match='pattern "own" '):
            Scanner((), {"own": pattern})


def test_finds_what_an_operator_described() -> None:
    """A pattern is a kind by its name, matched on letters and not on bytes, beside the detectors and only if asked
    for."""
    patterns = {"project": r"(?i)\bprj-\d{4}\b", "grade": "note [äö]\\b|größe"}
    scanner = Scanner({"project", "grade", "email"}, patterns)
    assert scanner.scan(["PRJ–１２３４ for a@example.com"]) == {"project", "email"}
    assert scanner.scan(["gro\u0308ße"]) == {"grade"}
    assert scanner.scan(["note ü"]) == frozenset()
    assert Scanner({"email"}, patterns).scan(["prj-1234"]) == frozenset()


def test_a_pattern_cannot_take_the_name_of_a_detector() -> None:
    with pytest.raises(ValueError, match="may not be called email, "):
        Scanner({"email"}, {"email": "x"})
    with pytest.raises(ValueError, match="may not be called unscannable, "):
        Scanner((), {"unscannable": "x"})


@pytest.mark.slow
def test_patterns_that_need_too_much_memory_together_are_refused() -> None:
    """An automaton that cannot run would find nothing, so it is not built."""
    patterns = {f"p{number}": rf"{number}\pL{{40}}" for number in range(200)}
    with pytest.raises(ValueError, match="need more memory than a scan has"):
        Scanner(patterns, patterns)


def masked(text: str, spans: tuple[Span, ...]) -> str:
    """The text with a placeholder in the place of each span."""
    for number, span in reversed(list(enumerate(spans, 1))):
        text = text[: span.start] + placeholder(span.kind, number) + text[span.end :]
    return text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no one", ""),
        ("to alice@example.com, bob@example.org.", "to [EMAIL_1], [EMAIL_2]."),
        ("né le… à ａｌｉｃｅ＠example.com, là", "né le… à [EMAIL_1], là"),
        ("e\u0301te\u0301 4111–1111\u200b–1111–1111 e\u0301", "e\u0301te\u0301 [CREDIT_CARD_1] e\u0301"),
        ("😀 +49 30 901820 😀", "😀 [PHONE_1] 😀"),
    ],
)
def test_says_where_things_stand_in_the_text_as_it_was_given(text: str, wanted: str) -> None:
    """Every occurrence, in characters of the original, whatever digits and invisible characters it was written in."""
    spans = SCANNER.spans(text)
    assert spans is not None
    assert masked(text, spans) == (wanted or text)


PIECES = st.one_of(
    st.sampled_from([text for _, text in FOUND]),
    st.sampled_from(LEFT),
    st.text(st.characters(), max_size=10),
    st.sampled_from([" ", "\n", ", ", "", "e\u0301", "ssn ", "phone "]),
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=6))
def test_nothing_is_found_where_all_spans_are_masked(pieces: list[str]) -> None:
    """Spans are ordered and apart, there are some where a scan finds something, and none are left after masking."""
    text = "".join(pieces)
    spans = SCANNER.spans(text)
    if spans is not None:
        assert bool(spans) == bool(SCANNER.scan([text]))
        places = [place for span in spans for place in (span.start, span.end)]
        assert places == sorted(places) and all(0 <= span.start < span.end <= len(text) for span in spans)
        assert SCANNER.scan([masked(text, spans)]) == frozenset()


@given(st.text(st.characters()))
def test_a_text_folded_at_once_and_with_places_is_the_same(text: str) -> None:
    """Both ways agree, folding twice changes nothing, and what changes is what the automaton looks for."""
    aligned = Aligned.of(text)
    assert aligned.text == folded(text).encode(errors="replace")
    assert len(aligned.text) == len(aligned.starts) == len(aligned.ends)
    assert list(aligned.starts) == sorted(aligned.starts)
    assert folded(folded(text)) == folded(text)
    if re2.search(CHANGES, text.encode(errors="replace")) is None:
        assert folded(text) == text


@pytest.mark.parametrize(
    "noise",
    [
        "1234 " * 40_000,
        "203.0.113.9 " * 6_000 + "12-34-567x " * 12_000,
        "DE12" * 50_000,
        "a@" * 100_000,
        "1" * 200_000,
        "+1" * 100_000,
        "eyJ." * 50_000,
        "é１" * 50_000,
    ],
    ids=["groups", "claims", "iban starts", "at signs", "digits", "plus signs", "dots", "wide digits"],
)
def test_finds_the_needle_behind_any_noise(noise: str) -> None:
    """However much looks like a number, what stands at the end is still found."""
    assert SCANNER.scan([noise, "and alice@example.com; 4111 1111 1111 1111"]) >= {"email", "credit_card"}


def test_what_is_not_checked_does_not_pass() -> None:
    """A text with more look-alikes than are checked is unscannable, and counts as having what was not ruled out."""
    few, many = MOST_WORK // WORK_OF_CANDIDATE // 2, MOST_WORK // WORK_OF_CANDIDATE + 1
    assert SCANNER.scan(["q@k.transpose() " * few]) == frozenset()
    assert SCANNER.scan(["q@k.transpose() " * many]) == {"email", "unscannable"}


def test_prints_what_a_scan_costs() -> None:
    """Prints the time of a scan of clean text; run with -s to see it."""
    prose = "The quick brown fox jumps over the lazy dog, and in 2024 it paid 35 euros for 12 things. See section 4.2. "
    for size in (2_000, 200_000):
        text = (prose * (size // len(prose) + 1))[:size]
        started = time.perf_counter()
        for _ in range(20):
            assert SCANNER.scan([text]) == frozenset()
        print(f"scan of {size:,} characters: {(time.perf_counter() - started) / 20 * 1e6:.0f} µs")


@pytest.mark.parametrize(
    "between", ["\ufe0f", "\U000e0020", "\U000e0101", "\u206a", "\u3164", "\uffa0", "\u202e", "\u180b"]
)
def test_what_cannot_be_seen_between_digits_hides_nothing(between: str) -> None:
    assert SCANNER.scan([f"4111{between} 11{between}11 1111 1{between}111"]) == {"credit_card"}
