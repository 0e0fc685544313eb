"""The demo's tokeniser against the `tokenizers` library, from which every expected value comes."""

from __future__ import annotations

import random
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from doorstep.demo.wordpiece import WordPiece, split

NORMALISE = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
PRE_TOKENISE = pre_tokenizers.BertPreTokenizer()

SENTENCES = [
    "The cat sat on the mat.",
    "  spaces\t\tand\r\nline breaks  ",
    "don't — “quote” (x)[y]{z} a_b c-d e/f 3.14 1,000 50% #1 user@example.org",
    "ÀÉÎÕÜ àéîõü ñ ç ß æ ø Ł İstanbul ΣΊΣΥΦΟΣ ŉ ǆ",
    "日本語のテキスト 中文字符 한국어 텍스트",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते ไทย",
    "👍🏽 👨‍👩‍👧 café cafe\u0301 \ufb01ne \u00bd ① Ⅷ ™ €5 £6",
    "\u200bzero\u200dwidth\ufeff nbsp\u00a0x \u2028 \u2029 \u3000 soft\u00adhyphen \ufffd nul\x00bell\x07del\x7f",
    "",
    "   ",
    "a" * 101,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
]


def expected_split(text: str) -> list[str]:
    return [word for word, _ in PRE_TOKENISE.pre_tokenize_str(NORMALISE.normalize_str(text))]


@pytest.mark.parametrize("text", SENTENCES)
def test_texts_are_split_as_the_library_splits_them(text: str) -> None:
    assert list(split(text)) == expected_split(text)


def test_every_character_of_unicode_3_2_is_treated_as_the_library_treats_it() -> None:
    """The library's tables are of Unicode 8, Python's are newer; what Unicode 3.2 had is in both."""
    changed = {0x166D, 0x1734, 0x1885, 0x1886}  # of another category since then: a Canadian, a Hanunoo, two Mongolian
    wrong = []
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if unicodedata.ucd_3_2_0.category(char) in ("Cn", "Cs") or code in changed:
            continue
        text = f"ab{char}Cd {char}"
        if list(split(text)) != expected_split(text):
            wrong.append(hex(code))
    assert not wrong


PIECES = (
    [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "cat",
        "##s",
        "un",
        "##aff",
        "##able",
        "##ab",
        "##le",
        "aff",
        "日",
        "本",
    ]
    + list("abcdefghijklmnopqrstuvwxy.,!-'\"")
    + [f"##{letter}" for letter in "abcdefghijklmnopqrst"]
)


@pytest.fixture(scope="module")
def library() -> Tokenizer:
    ids = {piece: number for number, piece in enumerate(PIECES)}
    found = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    found.normalizer = NORMALISE
    found.pre_tokenizer = PRE_TOKENISE
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    found.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    found.enable_truncation(16)
    return found


def test_ids_are_the_librarys(library: Tokenizer) -> None:
    ours = WordPiece(PIECES, max_tokens=16)
    draw = random.Random(7)
    texts = [
        *SENTENCES,
        "unaffable cats",
        "the[SEP]cat [sep] [CLS][PAD]s [MASK] [UNK",
        "THE CAT'S",
        "zebra",
        "the zebra the",
        "unz",
    ]
    alphabet = "abcdeghist zü.,-'Σ日\t"
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(2000)]
    assert [ours.encode(text) for text in texts] == [encoding.ids for encoding in library.encode_batch(texts)]


def test_what_is_no_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[CLS\], \[SEP\] missing"):
        WordPiece(["[UNK]", "a"])
