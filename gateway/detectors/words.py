"""Words that say what a number or a name beside them is, in the languages that people write to models in.

Owns the lists, in lower case, and how they are searched: by the automaton over a whole text (`Words.pattern`) and just before a
candidate (`Words.before`). Refuses to judge what follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.automaton import occurs
from gateway.fold import folded


@dataclass(frozen=True, slots=True)
class Words:
    """Words for one thing. A Latin letter before a word makes it another one ("iphone" is no phone), and so does one
    after it, unless the word ends with `*`. A space stands for a space, a dash, an underscore or nothing."""

    words: tuple[str, ...]
    pattern: str
    _anywhere: Callable[[bytes], bool]
    _first: Callable[[bytes], bool]
    _last: Callable[[bytes], bool]

    @classmethod
    def of(cls, *words: str) -> Words:
        """`words` are RE2."""
        words = tuple(map(folded, words))
        begun = {word for word in words if word[0].isascii()}
        pattern = "|".join(
            head + group
            for head, chosen in ((r"(?:^|[^A-Za-z])", begun), ("", set(words) - begun))
            if (group := _ended(sorted(chosen)))
        )
        last = rf"(?:{pattern})[^A-Za-z0-9,;\n]{{0,6}}(?:(?:no|nr|num|number|nummer|numéro|id|code|is)[^A-Za-z0-9,;\n]{{0,4}})?$"
        first = rf"^(?:[(\[][A-Za-z]{{1,10}})?(?:{pattern})"
        return cls(words, pattern, occurs(f"(?i){pattern}"), occurs(f"(?i){first}"), occurs(f"(?i){last}"))

    def before(self, text: bytes, start: int, reach: int = 48) -> bool:
        """Whether one of them stands in the `reach` bytes before a place."""
        return self._anywhere(text[max(0, start - reach) : start])

    def after(self, text: bytes, end: int) -> bool:
        """Whether one of them stands in brackets right behind a place: `4155552671 (mobile)`."""
        return text[end : end + 2].lstrip()[:1] in _BRACKETS and self._first(text[end : end + 32].lstrip())

    def name(self, text: bytes, start: int) -> bool:
        """Whether one of them is what is said right before a place: with "number" or signs between at most."""
        return self._last(text[max(0, start - 32) : start])


_BRACKETS = (b"(", b"[")


def _ended(words: Iterable[str]) -> str:
    stems = {word: word.rstrip("*").replace(" ", r"[ _\-]?") for word in words}
    whole = [stem for word, stem in stems.items() if word[-1].isascii() and word[-1] != "*"]
    begun = [stem for stem in stems.values() if stem not in whole]
    if not whole:
        return f"(?:{'|'.join(begun)})" if begun else ""
    return f"(?:{'|'.join([*begun, ''])}(?:{'|'.join(whole)})(?:[^A-Za-z]|$))"


# What stands where a secret would.
is_placeholder = occurs(
    r"(?i)your|example|sample|changeme|change_me|placeholder|dummy|redacted|(?-i:x{4}|X{4})|\*\*\*\*|\.\.\.|insert|<[a-z_ -]+>|process\.env"
    r"|getenv|environ|1234567890abcdef|\[[A-Z_]+_[0-9]+\]"
)

PHONE = Words.of(
    "phone*", "phones", "mobile*", "cell", "cellphone", "cellular", "tel", "telephone*", "telefon*", "fax", "whats ?app", "signal",
    "sms", "ph\\.? no", "mob", "mob no", "contact no", "contact number", "call me", "call us", "call him", "call her", "call them", "text me", "reach me", "reach us", "ring me", "dial*",
    "handy", "handynummer", "rufnummer", "telefonnummer", "mobilnummer", "mobil", "mobiltelefon", "anrufen", "rückruf",
    "tél", "téléphone", "portable", "teléfono", "móvil", "celular", "cellulare", "telefone", "telemóvel", "telefoon*", "gsm", "komórka", "komórk[ai]*",
    "mobilnr", "puhelin*", "puh", "telefonszám*", "mobilszám*", "telefonní číslo", "cep tel*", "τηλέφωνο", "κινητό", "τηλ", "телефон", "тел", "моб", "номер телефона", "мобильн*",
    "电话", "手机", "電話", "手機", "携帯", "전화", "휴대폰", "핸드폰", "هاتف", "جوال", "موبايل", "फ़ोन", "फोन", "मोबाइल", "điện thoại", "số máy", "sđt", "di động", "โทร", "telepon", "nomor hp",
)  # fmt: skip
CARD = Words.of(
    "card*", "pay*", "charge", "billing", "zahl*", "creditcard*", "kreditkarte*", "karte*", "kartennummer", "carte*", "tarjeta", "carta", "cartão", "karty", "karta", "kort", "kortnummer", "kortti*", "kart*",
    "visa", "mastercard", "amex", "maestro", "diners", "discover", "credit", "debit", "pan", "cc", "карт*", "卡号", "信用卡", "カード", "카드", "بطاقة", "कार्ड", "κάρτα*", "số thẻ", "thẻ",
)  # fmt: skip
SSN = Words.of("ssn*", "ssns", "social security*", "soc sec*", "social sec*", "tax ?payer*", "tax id*", "itin", "tin")
NUMBERED = Words.of(
    "order*", "invoice*", "ref", "reference*", "ticket*", "sku", "serial*", "part*", "version", "build", "isbn*", "issn", "ean", "upc", "doi", "tracking*", "case*", "item*", "model", "account*",
    "customer*", "shipment*", "parcel*", "lot", "batch", "article", "zip", "pid", "tid", "seq*", "ack", "block", "txid", "id", "bug", "po", "rma", "sendungs*", "bestell*", "auftrag*", "rechnung*", "kunden*",
    "vertrag*", "konto*", "artikel*", "commande*", "facture*", "colis", "pedido*", "factura*", "ordine*", "fattura*", "zamówieni*", "заказ*", "订单", "訂單", "注文", "주문", "iban", "blz", "bic", "ust*", "vat*", "hrb", "ein", "imo",
    "receipt*", "quote*", "confirmation*", "member*", "meter*", "chassis*", "epoch", "ts", "timestamp", "price*", "bytes", "size", "step", "port",
)  # fmt: skip
BIRTH = folded(
    r"date of birth|birth[ _\-]?dates?|birth[ _\-]?days?|d\.?o\.?b\.?|born(?: on)?|geburts(?:datum|tag)|geb(?:oren)?\.?(?: am)?|date de naissance|n[ée]e?(?: le)?|naissance"
    r"|fecha de nacimiento|nacid[oa](?: el)?|f\. ?nac\.?|data di nascita|nat[oa](?: il)?|data de nascimento|nascid[oa](?: em)?|geboorte(?:datum|dag)|data urodzenia|urodz(?:ony|ona)|ur\."
    r"|födelse(?:datum|dag)|född|fødselsdato|født|syntymäaika|datum narození|narozen[aý]?|születési (?:dátum|idő)|doğum (?:tarihi|günü)|дата рождения|родил[а-я]*|д\.р\."
    r"|出生日期|出生|生日|生年月日|誕生日|생년월일|생일|تاريخ الميلاد|जन्म ?(?:तिथि|तारीख)?|ngày sinh|sinh ngày|ημερομηνία γέννησης|data nașterii|tanggal lahir"
)  # fmt: skip
PASSPORT = folded(
    r"passports?(?:[ _\-]?(?:number|num|no|nr|id)\.?)?|reisepass(?:nummer)?|pass(?:nummer|[ \-]?nr|[ \-]?no)|passeports?|pasaportes?|passaport[oei]|paspoort(?:nummer)?|paszport(?:u|em)?|passinumero|pasaport|pasu|pas číslo"
    r"|паспорт[а-я]*|护照|護照|パスポート|旅券|여권|جواز(?: السفر)?|पासपोर्ट|hộ chiếu|διαβατήριο|útlevél"
)  # fmt: skip
PASSWORD = folded(
    r"pass[ _\-]?words?|pass[ _\-]?phrase|pass[ _\-]?wd|pass[ _\-]?code|passwort|kennwort|mot de passe|mdp|contraseñas?|clave|senha|palavra[ \-]passe|parola|wachtwoord|hasło|haslo|lösenord|adgangskode|passord|salasana"
    r"|heslo|jelszó|şifre|sifre|κωδικός(?: πρόσβασης)?|пароль|密码|密碼|口令|パスワード|비밀번호|암호|كلمة (?:المرور|السر)|पासवर्ड|mật khẩu|รหัสผ่าน|kata sandi|pwd|pswd|psw|pass|pw"
)  # fmt: skip
