"""What only looks like private data or a secret: order numbers, ISBNs, hashes, versions, timestamps, bad checksums,
code, logs, coordinates, prices.

Owns two families, `OPEN` and `BLIND`. A number that happens to have a right check digit is drawn again.
"""

from __future__ import annotations

import datetime
import uuid
from base64 import b64encode
from collections.abc import Callable, Mapping
from random import Random

from tests.bench.detectors.keys import ALNUM, HEX, text
from tests.bench.detectors.numbers import LETTERS, card, cut, digits, iban, luhn_digit

Make = Callable[[Random], str]


def _number(chance: Random, count: int) -> str:
    """Digits of which the last is not the check digit of the others."""
    while True:
        drawn = digits(chance, count, "123456789")
        if luhn_digit(drawn[:-1]) != drawn[-1]:
            return drawn


def _of(*shapes: str) -> Make:
    """Text in which `#` is a digit, `^` a letter, `~` a hexadecimal digit; `{12}` so many digits."""

    def make(chance: Random) -> str:
        shape = chance.choice(shapes)
        for count in range(4, 25):
            if f"{{{count}}}" in shape:
                shape = shape.replace(f"{{{count}}}", _number(chance, count))
        signs = {"#": "0123456789", "^": LETTERS, "~": HEX}
        return "".join(chance.choice(signs[sign]) if sign in signs else sign for sign in shape)

    return make


def _bad_card(chance: Random) -> str:
    number = "".join(card(chance))
    wrong = number[:-1] + str((int(number[-1]) + chance.randint(1, 9)) % 10)
    return chance.choice(("{}", "Order {}", "id {}", "{} is invalid")).format(
        chance.choice((" ", "-", "")).join(cut(wrong, 4, 4, 4))
    )


def _bad_iban(chance: Random) -> str:
    number = iban(chance)
    return number[:2] + f"{(int(number[2:4]) + chance.randint(1, 90)) % 97 + 2:02d}" + number[4:]


def _moment(chance: Random) -> datetime.datetime:
    return datetime.datetime(2015, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=chance.randrange(10**8 * 3))


def _date(chance: Random) -> str:
    when = _moment(chance)
    return chance.choice(
        (f"deployed on {when:%d.%m.%Y}", f"{when:%Y-%m-%dT%H:%M:%S.%fZ} started", f"since {when:%m/%d/%Y %H:%M}", f"epoch {when.timestamp():.0f}",
         f"ts={when.timestamp() * 1000:.0f}", f"{when:%Y%m%d%H%M%S}", f"backup-{when:%Y-%m-%d}.tar.gz", f"Am {when:%d.%m.%Y} um {when:%H:%M} Uhr", f"{when:%Y%m%dT%H%M%S}", f"le {when:%d/%m/%Y}")
    )  # fmt: skip


def _isbn(chance: Random) -> str:
    body = "978" + digits(chance, 9)
    body += str(-sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10)
    return chance.choice(("ISBN {}", "ISBN: {}", "EAN {}", "see {}")).format(
        chance.choice(("-", "")).join(cut(body, 3, 1, 4, 4))
    )


def _hash(chance: Random) -> str:
    return chance.choice(
        (lambda: f"commit {text(chance, HEX, 40)}", lambda: f"sha256:{text(chance, HEX, 64)}", lambda: f"md5 {text(chance, HEX, 32)}",
         lambda: text(chance, HEX, 7), lambda: f"integrity: sha512-{b64encode(chance.randbytes(64)).decode()}", lambda: f'ETag: "{text(chance, HEX, 32)}"',
         lambda: f"image: registry/app@sha256:{text(chance, HEX, 64)}", lambda: str(uuid.UUID(int=chance.getrandbits(128), version=4)), lambda: f"request id {uuid.UUID(int=chance.getrandbits(128))}")
    )()  # fmt: skip


def _data(chance: Random) -> str:
    return chance.choice(
        (lambda: f"data:image/png;base64,{b64encode(chance.randbytes(90)).decode()}",
         lambda: f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5{text(chance, ALNUM, 48)} build",
         lambda: f"-----BEGIN CERTIFICATE-----\n{b64encode(chance.randbytes(96)).decode()}\n-----END CERTIFICATE-----",
         lambda: f"-----BEGIN PUBLIC KEY-----\n{b64encode(chance.randbytes(96)).decode()}\n-----END PUBLIC KEY-----",
         lambda: f"https://cdn.example/{text(chance, ALNUM, 22)}/main.{text(chance, HEX, 8)}.js",
         lambda: f"https://youtu.be/{text(chance, ALNUM, 11)}?t=120")
    )()  # fmt: skip


def _floats(chance: Random) -> str:
    return chance.choice(
        (lambda: "[" + ", ".join(f"{chance.random():.16f}" for _ in range(4)) + "]",
         lambda: f"{chance.uniform(-90, 90):.6f}, {chance.uniform(-180, 180):.6f}",
         lambda: f"lat={chance.uniform(-90, 90):.13f}&lon={chance.uniform(-180, 180):.13f}",
         lambda: f"p = {chance.random():.12e}", lambda: f"{chance.randint(2, 99)}**{chance.randint(2, 40)} = {chance.getrandbits(60)}",
         lambda: f"x = {digits(chance, 8)} * {digits(chance, 5)} + {digits(chance, 4)}", lambda: f"{chance.uniform(0, 1e6):,.2f}",
         lambda: " ".join(str(chance.randint(1000, 3999)) for _ in range(5)), lambda: "\n".join(str(chance.randint(10, 999)) for _ in range(6)))
    )()  # fmt: skip


def _price(chance: Random) -> str:
    amount = chance.randint(1, 10**9)
    return chance.choice(
        (
            f"{amount:,} USD",
            f"EUR {amount:,}".replace(",", "."),
            f"{amount:,} Ft".replace(",", " "),
            f"$ {amount / 100:,.2f}",
            f"{amount:,} ₽".replace(",", "\u00a0"),
            f"¥{amount:,}",
        )
    )


_CODE = _of(
    "for i in range({7}): total += {8}", "const MAX = {10};", "0x~~~~~~~~~~~~~~~~", "return (x << 12) & 0x~~~~~~~~;", "npm i @scope/pkg@1.2#.3",
    "git clone git@github.com:org/repo.git", "@app.route('/v1/items')\ndef items(): ...", "y = q@k.transpose(-2, -1)", "img/icon@2x.png", "ssh deploy@build01",
    "std::vector<int> v; a::b::c", "password: str = Field(min_length=8)", "const { password, email } = req.body", "password = os.environ['DB_PASSWORD']",
    "api_key = os.getenv('API_KEY')", 'api_key: "YOUR_API_KEY"', "API_KEY=<your key here>", "token_count: {6}", "if token == tokens[index + 1]:", "pwd=$(pwd)",
    "<input type=\"password\" name=\"password\" placeholder=\"Password\">", "password=None, token=None", "secretKeyRef: {name: db, key: password}", "PASSWORD_RESET_URL=/account/reset",
    "\\u00e9\\u00e8 \\x1b[0m", "width: 1920px; height: 1080px; margin: 0 0 12px", "rgb(120, 130, 255) #a1b2c3", "SELECT * FROM t WHERE id IN (1001, 1002, 1003, 1004)",
)  # fmt: skip
_LOGS = _of(
    "pid ##### tid ##### 0x~~~~~~~~ at kernel.c:###", "10:20:30.### [worker-##] took ####ms, {8} bytes", "GET /v1/items/{9} 200 {5} \"-\"", "Chrome/1##.0.####.### Safari/537.36",
    "v1#.#.#-rc.#+build.{8}", "127.0.0.1 - - \"GET / HTTP/1.1\"", "listening on 0.0.0.0:80##", "eth0 00:1b:44:11:3a:~~", "OID 1.3.6.1.4.1.311.##.#", "loss=0.0####, step={6}, lr=3e-0#",
    "ERROR {6}: connection reset (errno 104)", "java.lang.Exception at Foo.java:###", "trace_id=~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ span=~~~~~~~~~~~~~~~~", "build {8}.{4}",
)  # fmt: skip
_PROSE = (
    "The password must have at least 12 characters.", "Forgot your password? Click here.", "password: required", "Your password is wrong.", "Password: ********", "Passwort: erforderlich",
    "The secret of success is hard work.", "The token is authentication_required_for_all", "He was born in 1984 in Ohio.", "We met on 12 March 2021.", "Section 12, page 345, line 7.",
    "Wall Street fell 3 percent, Main Street rose.", "A passport is required for the trip.", "Call me maybe, 24 hours a day, 7 days a week.", "My phone has 128 GB and 5000 mAh.", "Room 1204, floor 12.",
    "Der Zug ICE 123 fährt um 10:20 von Gleis 7.", "Le vol AF1234 part à 18 h 30.", "Seat 12A, flight LH 4567, gate B22.", "3 x 4 = 12 and 12 x 12 = 144", "He scored 2,147,483,647 points.",
    "Bank holidays in 2024: 25.12., 26.12.", "The IBAN has up to 34 characters.", "Credit card fees are 2.5 %.", "The SSN has nine digits.", "Use a private key and a JWT for this.",
    "Paragraph 5 Absatz 2 Satz 1 BGB", "E = mc2, h = 6.62607015e-34", "ratio 16:9, 4:3, 21:9", "scores 3-2, 4-1, 0-0", "pages 573-583, vol. 12, no. 3", "Bible, John 3:16-18",
)  # fmt: skip

OPEN: Mapping[str, Make] = {
    "orders": _of("Order #{10}", "order number {12}", "Bestellnummer {8}", "commande n° {9}", "Invoice INV-####-{6}", "ref. {11}", "ticket {7}", "Case ID: {9}", "PO {13}", "order ###-{7}-{7}"),
    "tracking": _of("tracking 1Z^^^{10}##", "Sendungsnummer {12}", "tracking no. {20}", "parcel {14}", "^^{9}^^", "FedEx {4} {4} {4}", "shipment {15}"),
    "isbn": _isbn, "hash": _hash, "bad card": _bad_card, "bad iban": _bad_iban, "date": _date, "data": _data, "floats": _floats, "price": _price, "code": _CODE, "log": _LOGS,
    "prose": lambda chance: chance.choice(_PROSE),
    "versions": _of("version ##.##.####", "v#.#.##", "python 3.1#.#", "CUDA 12.#, driver 535.1##.##", "build 20240#1#.#", "firmware #.##.##-###"),
    "phone-like": _of("SKU ###-####-###", "part no. ####-###-####", "account {8}", "serial {9}", "item ##-###-####", "DOI 10.1###/s#####-###-####-#", "ZIP #####-####", "customer {10}", "model ###-####", "bug #######"),
    "ssn-like": _of("000-##-####", "9##-##-####", "###-00-####", "ABC-###-##-####", "###-##-#####", "part ####-##-###", "lot ##-##-####"),
}  # fmt: skip

_BLIND_CODE = _of(
    "let total: u64 = {9};", "curl -s localhost:8080/v1/models", "x := []int{1024, 2048, 4096, 8192}", "sed -i 's/a@b/c/' file", "kubectl get pod web-~~~~~~~~~-^^^^^ -o yaml", "@pytest.mark.slow",
    "user.password = form.password.data", "if (!password) throw new Error('password missing');", "secret = secrets.token_hex(16)", "Bearer <token>", "${{ secrets.API_KEY }}", "token: ${TOKEN}", "password_hash VARCHAR(255) NOT NULL",
    "matrix = [[1, 0, 0], [0, 1, 0]]", "#define SIZE 0x7fffffff", "ip route add default via $GW", "time.sleep(0.25)", "assert x == 1234567890", "int8_t buf[4096];", "df.iloc[1000:2000, 3:7]", "\"password\": null, \"token\": \"\"",
)  # fmt: skip
_BLIND_PROSE = (
    "Change your password every 90 days.", "Password reset requested", "The api key is stored in the vault.", "Dates: 3.4., 5.6., 7.8.", "Flug OS 123 nach Wien um 07:45", "Between 1990 and 2005, 12345 people moved.",
    "Top 10 lists of 2023", "The birthday paradox needs 23 people.", "Her date of birth is unknown.", "The address of the object in memory", "Turn left on Oak Street after 200 metres.", "IP protects 7 layers", "Passport control is on level 2.",
    "O código tem 12 dígitos.", "電話は不要です。", "パスワードを忘れた場合", "Heslo musí mít 8 znaků", "şifre en az 8 karakter", "numero 7 of 9", "Chapter 11 filing No. 23-10832", "bus 100, 200 and 300 to Tegel", "BMI 22.5, BP 120/80, HR 72",
)  # fmt: skip
BLIND: Mapping[str, Make] = {
    "orders": _of("Pedido nº {9}", "Bestelling {10}", "zamówienie {11}", "your order ({16})", "confirmation code ^#^#^#", "RMA{8}", "quote Q-{7}", "Auftrag {6}/{4}", "заказ {9}", "receipt no {13}", "訂單編號 {12}"),
    "tracking": _of("RR{9}^^", "DHL {10}", "USPS 9400 1### #### #### #### ##", "JD{18}", "colissimo 6A{11}", "UPS 1Z ### ### ## #### ###"),
    "isbn": _of("ISBN-10 0-306-#####-X", "ISSN ####-####", "UPC {12}", "ASIN B0########", "arXiv:24##.#####v2", "PMID {8}"),
    "hash": _of("~~~~~~~~~~~~ refs/heads/main", "blake2b ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~", "crc32 ~~~~~~~~", "{~~~~~~~~-~~~~-4~~~-a~~~-~~~~~~~~~~~~}", "W/\"~~~~~~~~~~~~~~~~\"", "cid bafy^^^^^^^^"),
    "bad card": _bad_card, "bad iban": _bad_iban, "code": _BLIND_CODE, "prose": lambda chance: chance.choice(_BLIND_PROSE),
    "log": _of("[ {5}.{6}] usb 1-1: new device", "uptime: 12 days, 3:45, load 0.## 0.## 0.##", "mem {8}K total, {7}K free", "slot ## block {9} txid {12}", "HTTP/2 200 content-length: {6}", "nginx/1.2#.#", "goroutine ### [running]", "seq={10} ack={10} win=####"),
    "date": _of("2024W##-#", "20##-0#-1# 1#:2#", "1#/0#/202#", "Q# 202#", "0#:3#:#5,###", "1.7.202# bis 3.7.202#", "FY2#/2#", "17########", "17########.####", "{13} ms"),
    "price": _of("CHF #'###'###.##", "R$ #.###,##", "#,##,### INR", "US$#.#bn", "## ### kr", "₩#,###,###", "-#.##% (####)"),
    "floats": _of("(#.###e-0#, -#.####e+0#)", "N ##° ##.###' E ##° ##.###'", "[-#.####, #.####, #.####]", "{4}.{7}", "##;##;##;##;##;##", "####, ####, ####", "#.## ± 0.##"),
    "numbers": _of("HRB {6}", "USt-IdNr. DE{9}", "D-U-N-S ##-###-####", "meter {8} reading {6}", "chassis ^^^##^######", "license plate B-^^ ####", "lot {7} exp 202#", "EIN ##-#######", "member no. ### ### ###", "CAS ####-##-#", "IMO {7}"),
}  # fmt: skip
