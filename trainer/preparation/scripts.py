"""Which scripts (Latin, Cyrillic, ...) a vocabulary knows, and which texts are written in others.

A share of [UNK] alone does not tell: vocabularies hold the single letters of scripts whose words
they do not know, and such a text becomes one token a letter.
"""

import functools
import unicodedata
from collections import Counter

import tokenizers

from trainer.data.tokenizer import CONTINUATION, Tokenizer

# A script is known if so many of the vocabulary's pieces have two or more letters, all of it,
ENOUGH_PIECES = 32
# or, for those in which a letter is a word, if its letters are this share of the vocabulary. The
# English vocabulary of BERT has 8 such pieces of Cyrillic, and 1.6 % of it are Chinese characters.
ENOUGH_LETTERS = 0.05
LETTERS_ARE_WORDS = "CJK"
# Of a text; it is in another script if more than half of its letters are.
LOOKED_AT_CHARACTERS = 500
_ASCII_BUT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


@functools.cache
def script_of(letter: str) -> str:
    """A letter's script, as the first word of its Unicode name has it: LATIN, CJK, ..."""
    return unicodedata.name(letter, "UNNAMED").split()[0]


def count_scripts(text: str) -> Counter[str]:
    """Letters of each script in a text."""
    scripts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            scripts[script_of(character)] += count
    return scripts


def known_scripts(tokenizer: Tokenizer) -> frozenset[str] | None:
    """The scripts that a WordPiece vocabulary knows; None for a vocabulary of another kind."""
    if not isinstance(tokenizer.backend.model, tokenizers.models.WordPiece):
        return None
    pieces: Counter[str] = Counter()
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    for token in vocabulary:
        scripts = count_scripts(token.removeprefix(CONTINUATION))
        if len(scripts) == 1 and (scripts.total() > 1 or LETTERS_ARE_WORDS in scripts):
            pieces.update(scripts.keys())
    enough = dict.fromkeys(pieces, ENOUGH_PIECES)
    enough[LETTERS_ARE_WORDS] = int(ENOUGH_LETTERS * len(vocabulary))
    # A small vocabulary may have enough of no script; it knows the one that it has most of.
    known = {script for script, count in pieces.items() if count >= enough[script]}
    return frozenset(known or (script for script, _ in pieces.most_common(1)))


def unknown_script(text: str, known: frozenset[str]) -> str | None:
    """The commonest of the unknown scripts in which most of a text's letters are, if they are.

    Args:
      text: of which the first LOOKED_AT_CHARACTERS count.
      known: what `known_scripts` gave.
    """
    head = text[:LOOKED_AT_CHARACTERS]
    if "LATIN" in known:
        # Most texts are told apart by this much, at a tenth of the cost of counting.
        ascii_characters = head.encode("ascii", "ignore")
        num_letters = len(ascii_characters.translate(None, _ASCII_BUT_LETTERS))
        if len(head) - len(ascii_characters) <= num_letters:
            return None
    scripts = count_scripts(head)
    unknown = Counter({script: n for script, n in scripts.items() if script not in known})
    return unknown.most_common(1)[0][0] if 2 * unknown.total() > scripts.total() else None
