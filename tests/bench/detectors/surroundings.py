"""What stands around private data: sentences in several languages, records, logs, code.

Owns two families of languages and forms, `OPEN` and `BLIND`. `{}` is where the data goes, `{word}` a word for what it
is, `{key}` the name of a field. Refuses to hold private data itself, and numbers that could be taken for some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Around:
    """`neutral` says nothing of what the data is; `named` uses a word for it. Both by language. `records` use the name
    of a field, `loose` ones do without."""

    neutral: Mapping[str, tuple[str, ...]]
    named: Mapping[str, tuple[str, ...]]
    records: tuple[str, ...]
    loose: tuple[str, ...]


OPEN = Around(
    neutral={
        "en": (
            "Please use {} from now on.",
            "I wrote it down as {}, can you check?",
            "Here you go: {}.\nThanks a lot!",
            "({})",
            "It used to be {}; that changed in March.",
            'Customer says: "{}"',
            "{} is what they gave us",
            "Thanks,\nSam\n{}\n",
        ),
        "de": (
            "Bitte notieren: {}. Vielen Dank!",
            "Im Anhang steht {} – stimmt das so?",
            "Früher war es {}, oder?",
            "{} – mehr weiß ich nicht",
        ),
        "fr": (
            "Merci de noter {} s’il vous plaît.",
            "Voici : {}. À bientôt !",
            "Je crois que c’est {}, mais à vérifier",
        ),
        "es": ("Por favor, anote {} y gracias.", "¿Es correcto {}?", "Aquí lo tiene: {}."),
        "it": ("Ecco: {}. Grazie mille!", "Mi hanno dato {} ieri"),
        "nl": ("Noteer alstublieft {}, bedankt!",),
        "pl": ("Proszę zapisać: {}. Dziękuję!",),
        "ru": ("Пожалуйста, запишите {} и перезвоните.", "Вот: {}."),
        "zh": ("请记录{}，谢谢。", "就是 {} 吗？"),
        "ar": ("يرجى تسجيل {} وشكرا",),
    },
    named={
        "en": (
            "My {word} is {}.",
            "{word}: {}",
            "Could you update the {word} to {} please?",
            "{word} = {}",
            "The {word} on file ({}) is wrong",
            "{word} {}",
            "What is a {word}? Mine is {} by the way.",
        ),
        "de": ("Meine {word} lautet {}.", "{word}: {}", "Die {word} ist {}, bitte ändern."),
        "fr": ("Mon {word} est le {}.", "{word} : {}", "Le {word} ({}) a changé"),
        "es": ("Mi {word} es {}.", "{word}: {}"),
        "it": ("Il mio {word} è {}.", "{word}: {}"),
        "nl": ("Mijn {word} is {}.", "{word}: {}"),
        "pl": ("Mój {word} to {}.", "{word}: {}"),
        "ru": ("Мой {word}: {}.", "{word} {}"),
        "zh": ("我的{word}是{}。", "{word}：{}"),
        "ar": ("{word}: {}",),
    },
    records=(
        '{{"id": 7, "{key}": "{}", "ok": true}}',
        "{key}={}",
        "{key}: {}\n",
        "<{key}>{}</{key}>",
        "name,{key}\nJo,{}\n",
        "UPDATE t SET {key} = '{}' WHERE id = 4;",
        "| {key} | {} |",
        'record["{key}"] = "{}"',
        "2024-05-01T10:20:30Z INFO user={key} value={}",
    ),
    loose=(
        '["a", "{}", 3]',
        "> {}\n> was quoted",
        "id;value\n4;{}\n",
        "- [ ] check {}",
        "<td>{}</td>",
        "x = '{}'  # from the ticket",
        "2024-05-01 10:20:30 WARN could not parse {}",
        "```\n{}\n```",
    ),
)
BLIND = Around(
    neutral={
        "en": (
            "hi team, pls note {} asap",
            "re: your question, it's {} I believe",
            "*{}*",
            "[{}]",
            "→ {} ←",
            "old: n/a, new: {}",
            "ok so… {} ?!",
            "Attn. J. Doe / {} / urgent",
        ),
        "pt": ("Por favor anote {}, obrigado.", "Segue: {}"),
        "sv": ("Var god notera {}, tack!", "Det är {} som gäller"),
        "ja": ("{}をご確認ください。", "こちらです：{}"),
        "tr": ("Lütfen {} olarak kaydedin.",),
        "hi": ("कृपया {} नोट करें।",),
        "ko": ("{} 확인 부탁드립니다.",),
        "cs": ("Prosím zapište si {}. Děkuji!",),
        "el": ("Παρακαλώ σημειώστε {}.",),
        "vi": ("Vui lòng ghi lại {} nhé.",),
    },
    named={
        "en": (
            "{word} – {}",
            "{word}# {}",
            "{word}\n{}",
            "{word} on the account? {}",
            "use this {word} instead please → {}",
            "their {word} should be {} I think",
            "{word} (new): {}",
        ),
        "pt": ("O meu {word} é {}.", "{word}: {}"),
        "sv": ("Mitt {word} är {}.", "{word}: {}"),
        "ja": ("{word}は{}です。", "{word}：{}"),
        "tr": ("{word}: {}", "{word} numaram {}"),
        "hi": ("मेरा {word} {} है।", "{word}: {}"),
        "ko": ("{word}: {}", "제 {word}는 {} 입니다"),
        "cs": ("Můj {word} je {}.", "{word}: {}"),
        "el": ("{word}: {}",),
        "vi": ("{word}: {}", "{word} của tôi là {}"),
    },
    records=(
        "{{'{key}': '{}'}}",
        "{key} => {}",
        '<input name="{key}" value="{}">',
        "[{key}]={}&x=1",
        "--{key} {}",
        "{key}\t{}\n",
        "{key}:{}",
        "export {key}='{}'",
        '{{\n  "{key}":\n    "{}"\n}}',
        "* {key}: `{}`",
    ),
    loose=(
        "<p>{}</p>",
        "a\t{}\tb",
        "{};;;",
        "# {}",
        "('{}', None)",
        "data={}&page=2",
        'say "{}" twice',
        "1) {}\n2) none",
    ),
)

# Words for a kind, by language, and names of fields.
WORDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "credit_card": {"en": ("credit card", "card number", "Visa card"), "de": ("Kreditkarte", "Kartennummer"), "fr": ("numéro de carte", "carte bancaire"), "es": ("número de tarjeta",), "it": ("numero della carta",), "nl": ("creditcard",), "pl": ("numer karty",), "ru": ("номер карты",), "zh": ("信用卡号",), "ar": ("رقم البطاقة",), "pt": ("número do cartão",), "sv": ("kortnummer",), "ja": ("カード番号",), "tr": ("kart numarası",), "hi": ("कार्ड नंबर",), "ko": ("카드 번호",), "cs": ("číslo karty",), "el": ("αριθμός κάρτας",), "vi": ("số thẻ",)},
    "iban": {"": ("IBAN",), "en": ("IBAN", "bank account"), "de": ("IBAN", "Bankverbindung"), "fr": ("IBAN", "compte bancaire"), "zh": ("银行账号",)},
    "us_ssn": {"en": ("SSN", "social security number", "Social Security No.", "ssn")},
    "phone": {"en": ("phone number", "mobile", "phone", "cell", "fax"), "de": ("Telefonnummer", "Handynummer", "Tel.", "Mobilnummer"), "fr": ("téléphone", "numéro de portable", "tél"), "es": ("teléfono", "móvil"), "it": ("telefono", "cellulare"), "nl": ("telefoonnummer",), "pl": ("telefon", "numer telefonu"), "ru": ("телефон", "номер телефона"), "zh": ("电话", "手机号"), "ar": ("هاتف", "رقم الهاتف"), "pt": ("telefone", "celular"), "sv": ("telefonnummer", "mobil"), "ja": ("電話番号", "携帯"), "tr": ("telefon", "cep telefonu"), "hi": ("फ़ोन", "मोबाइल"), "ko": ("전화번호", "휴대폰"), "cs": ("telefon", "telefonní číslo"), "el": ("τηλέφωνο",), "vi": ("số điện thoại", "điện thoại")},
    "email": {"en": ("email", "e-mail address"), "de": ("E-Mail",), "fr": ("courriel",), "es": ("correo",), "it": ("email",), "nl": ("e-mail",), "pl": ("adres e-mail",), "ru": ("почта",), "zh": ("邮箱",), "ar": ("البريد",), "pt": ("e-mail",), "sv": ("e-post",), "ja": ("メール",), "tr": ("e-posta",), "hi": ("ईमेल",), "ko": ("이메일",), "cs": ("e-mail",), "el": ("email",), "vi": ("email",)},
    "password": {"en": ("password", "Password", "passphrase", "login password", "PASSWORD"), "de": ("Passwort", "Kennwort"), "fr": ("mot de passe",), "es": ("contraseña",), "it": ("password",), "nl": ("wachtwoord",), "pl": ("hasło",), "ru": ("пароль",), "zh": ("密码",), "ar": ("كلمة المرور",), "pt": ("senha",), "sv": ("lösenord",), "ja": ("パスワード",), "tr": ("şifre", "parola"), "hi": ("पासवर्ड",), "ko": ("비밀번호",), "cs": ("heslo",), "el": ("κωδικός πρόσβασης",), "vi": ("mật khẩu",)},
    "api_key": {"en": ("API key", "access token", "secret key", "client secret", "auth token"), "de": ("API-Key", "API-Schlüssel"), "fr": ("clé API",), "es": ("clave de API",)},
    "ip_address": {"en": ("IP", "IP address", "host"), "de": ("IP-Adresse",), "fr": ("adresse IP",)},
    "passport": {"en": ("passport number", "passport no.", "passport"), "de": ("Reisepass Nr.", "Passnummer"), "fr": ("numéro de passeport",), "es": ("pasaporte",), "it": ("passaporto",), "pt": ("passaporte",), "sv": ("passnummer",)},
    "date_of_birth": {"en": ("date of birth", "DOB", "birthday", "born on"), "de": ("Geburtsdatum", "geb. am", "geboren am"), "fr": ("date de naissance", "né le"), "es": ("fecha de nacimiento", "nacido el"), "pt": ("data de nascimento",), "sv": ("födelsedatum",), "cs": ("datum narození",), "tr": ("doğum tarihi",)},
    "street_address": {"en": ("address", "home address"), "de": ("Adresse", "Anschrift"), "fr": ("adresse",), "es": ("dirección",), "it": ("indirizzo",), "nl": ("adres",), "pl": ("adres",), "pt": ("endereço", "morada")},
}  # fmt: skip
KEYS: Mapping[str, tuple[str, ...]] = {
    "credit_card": ("card_number", "cc", "pan", "creditCard"),
    "iban": ("iban", "bank_account", "account"),
    "us_ssn": ("ssn", "SSN", "social_security_number", "socialSecurityNumber"),
    "phone": ("phone", "mobile", "phone_number", "phoneNumber", "tel"),
    "email": ("email", "mail", "contact"),
    "password": ("password", "passwd", "pwd", "db_password", "DB_PASSWORD", "userPassword"),
    "api_key": ("api_key", "apiKey", "API_KEY", "access_token", "client_secret", "SECRET_KEY", "auth_token"),
    "ip_address": ("ip", "remote_addr", "host", "src"),
    "passport": ("passport", "passport_number", "passportNo"),
    "date_of_birth": ("dob", "birth_date", "date_of_birth", "birthday"),
    "street_address": ("address", "street", "shipping_address"),
    "national_id": ("national_id", "tax_id", "id_number"),
}


def around(chance: Random, family: Around, kind: str, data: str, *, named: bool, words: tuple[str, ...] = ()) -> str:
    """The data in a sentence or a record; `named`: one that says what it is. `words` replace those of the kind."""
    if kind in KEYS and chance.random() < 0.3 and not words:
        shape = chance.choice(family.records) if named else chance.choice(family.loose)
        return shape.format(data, key=chance.choice(KEYS[kind]))
    if not named:
        if chance.random() < 0.2:
            return chance.choice(family.loose).format(data)
        language = chance.choice(list(family.neutral)) if chance.random() < 0.6 else "en"
        return chance.choice(family.neutral[language]).format(data)
    known = WORDS.get(kind, {})
    languages = [language for language in family.named if words or language in known] or ["en"]
    language = chance.choice(languages) if chance.random() < 0.6 else "en"
    word = chance.choice(words or known.get(language) or known["en"])
    return chance.choice(family.named[language]).format(data, word=word)
