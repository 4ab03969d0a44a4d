"""Texts without blanks are tokenised in pieces: the ids of the whole text, for a bounded price."""

import dataclasses

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from trainer.data import tokenizer as tokenizer_module
from trainer.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from trainer.errors import UserError

ODD = [
    "a", "b", "ab", "q", "A", "ß", "İ", "Σ", "\u00e9", "e\u0301", "\u1ebf", "한", "ᄒ",
    "か\u3099", "ﬁ", "中", "文", "\U00020000", "\uf900", "。", "，", "—", "…", "¿", ".",
    ",", "[", "]", "#", "_", "$", "'", "[SEP]", "[MASK]", "[UNK]", "[MA", "SK]", "UNK]",
    "[[", "]]", "<x>", "x>", "#q", "##", "\0", "\x01", "\x7f", "\u200b", "\u200d", "\ufeff",
    "\ufe0f", "\ufffd", "\u00ad", "\ue000", "\u0301", "\u0323", "\u0591", "\u302e",
    "\u302f", "\U0001d165", "\U0001d15f", "\u0903", "\u20dd", "\u0345", "\u037e", "\u1fef",
    "\u0387", "\u2329", "\U0001f600", "\U000e0100", "\u2028", "\x85", " ", "\n", "\t", "\r",
    "\u00a0", "\u3000", "\x0b",
]  # fmt: skip
PARTS = st.lists(
    st.tuples(st.sampled_from(ODD), st.sampled_from([1, 1, 1, 2, 7, 30])), min_size=1, max_size=14
).map(lambda parts: "".join(part * times for part, times in parts))  # fmt: skip

SPECIAL = [AddedToken(token, normalized=False) for token in ("<x>", "#q", "[[", "##")]
# Flags of the normaliser, added tokens, and whether words can be cut.
TOKENIZERS = {
    "uncased": ({}, [], True),
    "cased": ({"lowercase": False}, [], True),
    "accents": ({"strip_accents": False}, [], True),
    "accents stripped": ({"lowercase": False, "strip_accents": True}, [], True),
    "no CJK": ({"handle_chinese_chars": False}, [], True),
    "unclean": ({"clean_text": False}, [], True),
    "special": ({}, SPECIAL, True),
    "normalised": ({}, [AddedToken("[ab", normalized=True)], False),
    "within words": ({}, [AddedToken("ab", normalized=False)], False),
    "single word": ({}, [AddedToken("#q", normalized=False, single_word=True)], False),
}


def make(flags: dict, added: list[AddedToken], longest_word: int) -> Tokenizer:
    """A tokenizer of few letters to which short words are too long."""
    small = train_tokenizer([" ".join(ODD), "ab ba abab aba ba q"] * 3, 600)
    backend = tokenizers.Tokenizer.from_str(small.backend.to_str())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for mark in "\u0301\u0323\u302e\u302f\U0001d165\u0903\ufe0f":  # Those that are stripped too.
        for token in (mark, f"##{mark}"):
            vocabulary.setdefault(token, len(vocabulary))
    backend.model = tokenizers.models.WordPiece(
        vocabulary, unk_token="[UNK]", max_input_chars_per_word=longest_word
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer(**flags)
    backend.add_tokens(added)
    return dataclasses.replace(small, backend=backend)


def uncut(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, which always reads whole texts."""
    whole = dataclasses.replace(tokenizer)
    whole.__dict__["splits_at_blanks"] = False
    return whole


def check_equal(tokenizer: Tokenizer, max_examples: int) -> None:
    whole = uncut(tokenizer)

    @given(PARTS, st.tuples(st.integers(8, 12), st.integers(0, 6), st.integers(1, 30)))
    @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)
    def check(text, limits):
        expected = whole.encode_windows([text, text + "."], *limits)
        assert tokenizer.encode_windows([text, text + "."], *limits) == expected

    check()


@pytest.mark.parametrize("longest_word", [3, 40])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_without_blanks_have_the_windows_of_whole_ones(name, longest_word, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(tokenizer_module, "_WORD_CHARACTERS", 0)
    flags, added, can_be_cut = TOKENIZERS[name]
    tokenizer = make(flags, added, longest_word)
    assert (tokenizer._characters is not None) == can_be_cut
    check_equal(tokenizer, 150)


@pytest.mark.parametrize(
    "text",
    [
        "\x01" * 90 + "a" * 90,  # Its first letters come late.
        "\x01" * 90 + "a" * 40 + "\x01" * 90 + ".",  # As long as a word may be.
        "#\x01q" + "\x01" * 90 + ".", "<" + "\x01" * 90 + "x>", "[SE" + "\x01" * 90 + "P]",
        "#q" + "a" * 90 + ".", "[SEP" + "a" * 90 + "]", "a" * 90 + "#q",
        "a" + "\x01" * 90 + "\u302e\ufe0f\U0001d165.",  # Marks whose order a third one keeps.
        "a" + "\x01" * 90 + "\u302e\u0301\U0001d165.",
        "a\u302e" + "\u0301" * 90 + "\ufe0f\U0001d165.", "a\U0001d15f" + "\ufe0f" * 90 + "\u302e",
    ],
    ids=range(12),
)  # fmt: skip
@pytest.mark.parametrize("longest_word", [40, 41])
def test_what_vanishes_from_a_long_word_changes_nothing(text, longest_word, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(tokenizer_module, "_WORD_CHARACTERS", 0)
    tokenizer = make({}, SPECIAL, longest_word)
    for part in (text, text + " b", "b." + text):
        expected = uncut(tokenizer).encode_windows([part], 8, 0, 2)
        assert tokenizer.encode_windows([part], 8, 0, 2) == expected


@pytest.mark.long
@pytest.mark.parametrize("longest_word", [1, 5, 12])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_many_texts_have_the_windows_of_whole_ones(name, longest_word, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(tokenizer_module, "_WORD_CHARACTERS", 0)
    check_equal(make(*TOKENIZERS[name][:2], longest_word), 4000)


def test_long_words_and_chinese_have_the_ids_of_a_real_vocabulary(minilm):
    tokenizer = load_tokenizer(minilm)
    whole = uncut(tokenizer)
    texts = [
        "x" * 9000 + " and more", "漢字かな交じり文。" * 900, "no-blank,but-stops;" * 900,
        ("y" * 99 + "\u0301" * 9000 + "z") + "." + "end" * 9000 + "?", "]" * 9000,
        "\x01" * 9000 + "[SEP]" * 900, "a\ufe0f" * 9000, "Ünïcödé" * 3000 + "—" * 3000,
    ]  # fmt: skip
    for limits in ((16, 0, 1), (64, 31, 4), (512, 0, 2)):
        assert tokenizer.encode_windows(texts, *limits) == whole.encode_windows(texts, *limits)


# A part of which a text of ten megabytes is made, and whether tokens of it are lost.
HUGE = {
    "a": ("a", False), "controls": ("\x01", False), "accents": ("\u0301", False),
    "marks": ("\x01\u0301\u0591", False), "digits": ("0123456789", False), "blanks": (" ", False),
    "CJK": ("中", True), "stops": ("。", True), "commas": (",", True), "[": ("[", True),
    "Thai": ("ที่สุด", False), "Hindi": ("कुमा", False), "hearts": ("\u2764\ufe0f", False),
    "base64": ("aGVs+bG8/", True), "words": ("no ", True),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_ten_megabytes_are_tokenised_in_small_pieces(name):
    part, loses = HUGE[name]
    small, seen = make({}, [], 100), []

    class Backend:
        def encode_batch_fast(self, texts):
            seen.extend(map(len, texts))
            return small.backend.encode_batch_fast(texts)

    watched = dataclasses.replace(small, backend=Backend())
    watched.__dict__.update(_characters=small._characters, splits_at_blanks=small.splits_at_blanks)
    found = watched.encode_windows([part * (10_000_000 // len(part)) + "end"], 64, 0, 2)
    assert max(seen) < 2000
    assert found == uncut(small).encode_windows([part * 1000 + "end"], 64, 0, 2)
    assert found[1] == [loses]


def test_a_text_that_cannot_be_cut_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MAX_WHOLE_CHARACTERS", 10_000)
    small = make({}, [], 100)
    small.backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert not small.splits_at_blanks
    assert small.encode_windows(["ab " * 3000], 16, 0, 1)[1] == [True]
    message = r"a text of 12,000 characters \('\\xe9\\n.*expected at most 10,000; shorten it"
    with pytest.raises(UserError, match=message) as caught:
        small.encode_windows(["é\n" * 6000], 16, 0, 1)
    assert "\n" not in str(caught.value) and str(caught.value).isascii()
