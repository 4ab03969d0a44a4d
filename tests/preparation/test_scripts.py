"""Scripts: which ones a vocabulary knows, and which texts are in others."""

from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.preparation.statistics import known_scripts, unknown_script

RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю; булки мягкие, чай крепкий."
CHINESE = "我们在城市里买了很多书。"
GREEK = "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία."


def test_berts_english_vocabulary_knows_latin_alone(minilm):
    # It holds 78 Cyrillic letters, 8 pieces of two and more, and 488 Chinese characters.
    assert known_scripts(load_tokenizer(minilm)) == {"LATIN"}


def test_a_vocabulary_knows_the_scripts_of_the_texts_that_it_was_made_of():
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 200)))
    russian = train_tokenizer([RUSSIAN] * 5, 300)
    assert known_scripts(russian) == {"CYRILLIC"}
    assert known_scripts(train_tokenizer([letters] * 5, 800)) == {"CJK"}
    english = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 5], 160)
    # Too small for 32 pieces of anything.
    assert known_scripts(english) == {"LATIN"}


def test_a_vocabulary_of_another_kind_is_not_judged(minilm):
    import dataclasses

    import tokenizers

    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    assert known_scripts(dataclasses.replace(load_tokenizer(minilm), backend=other)) is None


def test_a_text_is_in_the_script_of_most_of_its_letters():
    latin = frozenset({"LATIN"})
    cases = {
        "plain": None,
        "naïve Ærøskøbing": None,
        "1234, 5678!": None,
        RUSSIAN: "CYRILLIC",
        CHINESE: "CJK",
        GREEK: "GREEK",
        "четыре four": "CYRILLIC",  # Six letters of ten.
        "пять five": None,  # Four of eight: no more than half.
        "αβγ где zzzzz": "GREEK",  # Together six of eleven; as many of one as of the other.
        "a 1 2 3 4 5 – ж": None,  # More other characters than ASCII letters, but no more letters.
        "1 2 3 4 5 6 7 8 9 a, b, где": "CYRILLIC",
        "x" * 500 + RUSSIAN * 50: None,  # Only the beginning is looked at.
    }
    assert {text: unknown_script(text, latin) for text in cases} == cases
    assert unknown_script("plain", frozenset({"CYRILLIC"})) == "LATIN"
    assert unknown_script(RUSSIAN, frozenset({"CYRILLIC"})) is None
