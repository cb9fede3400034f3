"""The language of a text: named when it is clear, undecided rather than wrong, never an error."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.routing.text.language import (
    Language,
    detect,
    has_foreign_script,
)

SENTENCES = {
    "en": [
        "How does a lighthouse keep its lamp turning all night?",
        "Please explain the rules of curling to me.",
        "What should I cook for six people on a rainy Sunday",
        "give me a list of old castles near Edinburgh",
        "My neighbour plays the drums at midnight, can I complain?",
    ],
    "fr": [
        "Comment fait-on pousser des tomates sur un balcon ?",
        "Pourquoi les feuilles tombent-elles en automne ?",
        "Explique-moi la différence entre une comète et un astéroïde.",
        "Je voudrais organiser une fête pour mes parents.",
        "Où est la gare la plus proche ?",
    ],
    "es": [
        "¿Cómo puedo aprender a nadar siendo adulto?",
        "Necesito ideas para una cena con mis vecinos.",
        "¿Por qué el mar es salado?",
        "Escribe una carta para mi abuela que vive en Chile.",
        "El perro de mi hermana no quiere comer, ¿qué hago?",
    ],
    "de": [
        "Warum ist der Himmel am Abend rot?",
        "Wie kann ich meinen alten Computer schneller machen?",
        "Schreibe bitte einen kurzen Brief an meinen Vermieter.",
        "Was kostet ein Flug nach Lissabon?",
        "Ich suche ein Geschenk für meine Schwester.",
    ],
    "it": [
        "Come si prepara un buon risotto ai funghi?",
        "Qual è il fiume più lungo d'Italia?",
        "Vorrei imparare a suonare la chitarra.",
        "Perché i gatti fanno le fusa?",
        "Scrivi una breve poesia sul mare.",
    ],
    "pt": [
        "Como posso economizar água em casa?",
        "Qual é a melhor época para visitar Lisboa?",
        "Preciso de ajuda para escrever um convite.",
        "Por que o céu é azul durante o dia?",
        "Você pode me explicar o que é a inflação?",
    ],
    "zh": [
        "请告诉我怎样才能睡得更好。",
        "北京到上海坐高铁要多久？",
        "為什麼貓喜歡紙箱？",
        "用Python写一个计算器",
    ],
    "ja": [
        "おいしい味噌汁の作り方を教えてください。",
        "京都でおすすめのお寺はどこですか？",
        "このエラーの意味は何ですか",
        "東京の天気は？",
    ],
    "ko": [
        "서울에서 부산까지 기차로 얼마나 걸려요?",
        "맛있는 김치찌개 만드는 법을 알려 주세요.",
        "이 문장을 영어로 번역해 줘",
    ],
    "ar": [
        "كيف أتعلم العزف على العود؟",
        "ما هي أفضل مدينة للزيارة في الشتاء؟",
        "اكتب لي قصة قصيرة عن البحر",
    ],
    "ru": [
        "Почему зимой рано темнеет?",
        "Как научиться играть на гитаре?",
        "Напиши короткое письмо моему другу.",
    ],
}
WITHOUT_ACCENTS = {
    "fr": ["quelle est la difference entre un crapaud et une grenouille", "ou est la poste"],
    "es": ["como se hace una tortilla", "que es la gravedad", "cuantos anos tiene la luna"],
    "de": ["wie spaet ist es jetzt in Tokio", "was heisst das auf Deutsch"],
    "it": ["perche il mare e salato", "quanto costa un biglietto per Roma"],
    "pt": ["voce sabe onde fica a estacao", "o que e um buraco negro", "nao sei o que fazer"],
}
GREETINGS = {"es": "hola", "fr": "bonjour", "de": "hallo", "it": "ciao", "pt": "olá"}
any_text = st.text(alphabet=st.characters(exclude_categories=()), max_size=400)


def _cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(code, text) for code, texts in table.items() for text in texts]


@pytest.mark.parametrize(("code", "text"), _cases(SENTENCES))
def test_names_the_language(code: str, text: str) -> None:
    """An ordinary question in any of the supported languages is named."""
    assert detect(text).code == code


@pytest.mark.parametrize(("code", "text"), _cases(WITHOUT_ACCENTS))
def test_accents_may_be_missing(code: str, text: str) -> None:
    """A short question typed without accents is still told from its neighbours."""
    assert detect(text).code == code


@pytest.mark.parametrize(("code", "word"), list(GREETINGS.items()))
def test_one_greeting_is_enough(code: str, word: str) -> None:
    """A greeting alone names its language."""
    assert detect(word).code == code
    assert detect(f"{word.capitalize()}!").code == code


@pytest.mark.parametrize(
    "text",
    [
        "ls -la",
        "x = 5; y = x * 3",
        "while x < 10: x += step",
        "git rebase -i HEAD~3",
        "SELECT la FROM el WHERE die = 1",
        "const die = { der: 1 };",
        "ok",
        "a",
        "de",
        "42",
        "3.14 * r^2",
        "jalapeño dip",
        "crème de la crème",
        "Dvořák",
        "NullPointerException",
    ],
)
def test_code_and_scraps_are_not_foreign(text: str) -> None:
    """Code and a word or two are undecided or English, not some other language."""
    assert detect(text).code in (None, "en")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", 'Translate "¿dónde está la biblioteca?" into German for my sister.'),
        ("en", "What does the word 猫 mean in this old song?"),
        ("en", "Let α and β be two angles of the triangle, what is the third?"),
        ("en", "Who wrote «Le Petit Prince» and when was it published?"),
        ("es", "Explica este código: for (let i = 0; i < n; i++) { console.log(i); }"),
        ("zh", "解释这段代码\ndef f(items):\n    return [x for x in items if x is not None]"),
        ("ru", "Исправь функцию my_function в файле main.py"),
    ],
)
def test_what_is_quoted_does_not_count(code: str, text: str) -> None:
    """The language is the writer's own, not that of a quotation, of code or of a symbol."""
    assert detect(text).code == code


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("uk", "Розкажи мені, будь ласка, про Київ"),
        ("fa", "چگونه می‌توانم پیانو یاد بگیرم؟"),
        ("el", "Πού είναι η πλησιέστερη στάση;"),
        ("he", "איך מכינים חומוס?"),
        ("th", "กรุงเทพอยู่ที่ไหน"),
        ("hi", "दिल्ली कहाँ है?"),
        ("nl", "Hoe maak ik een goede erwtensoep?"),
    ],
)
def test_neighbours_are_not_mistaken(code: str, text: str) -> None:
    """Languages next to the supported ones get their own code instead of a wrong one."""
    assert detect(text).code == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t ",
        "😀🎉👍🏽",
        "\ud800",
        "\udfff abc \ud800",
        "\u200b\u200d\ufeff",
        "\x00\x01\x1b[31m",
        "\u202e\u200f",
    ],
)
def test_no_letters_is_undecided(text: str) -> None:
    """Emoji, control characters, lone surrogates and invisible marks are undecided."""
    assert detect(text) == Language(None, 0.0)


def test_right_to_left_marks_do_not_matter() -> None:
    """Direction marks around a text do not change its language."""
    assert detect("\u202bكيف حالك اليوم يا صديقي\u202c").code == "ar"


@settings(deadline=None)
@given(any_text)
def test_any_text_gets_an_answer(text: str) -> None:
    """Whatever the text, there is an answer with a confidence in [0, 1], always the same."""
    found = detect(text)
    assert 0.0 <= found.confidence <= 1.0
    assert (found.code is None) == (found.confidence == 0.0)
    assert detect(text) == found


@settings(deadline=None, max_examples=20)
@given(any_text, any_text)
def test_only_the_ends_of_a_long_text_are_read(one: str, other: str) -> None:
    """The middle of a long text does not change the result, so the work is bounded."""
    head, tail = "Dit is een lange tekst. " * 100, "The end of the text. " * 50
    fill = 1_000
    assert detect(head + one.ljust(fill) + tail) == detect(head + other.ljust(fill) + tail)


@pytest.mark.parametrize("piece", ["é ", "que la ", "'a", '"', "`", "«", "你", "ж", "\u0301"])
def test_a_million_characters(piece: str) -> None:
    """A million characters of anything come back without an error."""
    assert 0.0 <= detect(piece * (1_000_000 // len(piece))).confidence <= 1.0


def test_foreign_script() -> None:
    """A word in another script is seen inside of an English sentence; a lone symbol is not one."""
    assert has_foreign_script("What does привет mean?")
    assert has_foreign_script("What does 水 mean?")
    assert not has_foreign_script("The naïve café of Zoë")
    assert not has_foreign_script("Let α = 3")
