"""Whether two tokenizers give the same ids, however each of them was saved.

Fingerprints also differ where no id does: by the settings that a version of the library writes out,
or by tokens that somebody added at the end. So ids and texts are compared.
"""

import os
from collections.abc import Iterator

from trainer.data import tokenizer
from trainer.data.tokenizer import Tokenizer
from trainer.errors import UserError

# What tokenizers treat in different ways: letters with accents, scripts, signs, invisible
# characters, compatibility forms, words that no vocabulary has.
_TEXTS = (
    "Crème BRÛLÉE Ångström İstanbul ß ẞ Ǆ ΣΊΣΥΦΟΣ Йод",
    "中文字 日本語のテキスト 한국어 ภาษาไทย العربية",
    "don't (re-do) e-mail@host.org: 3.14% «q» “r” a_b $5 x^2 `y` ~z",
    "a\x00b\ufffdc\u200bd\u00a0e\tf\u2028g\u00adh",
    "ﬁ ½ ℃ Ａ１ ⅷ \U0001f600 ☃ qzxjkwv",
)
_NUM_WORDS = 200


def load_own_tokenizer(folder: str) -> Tokenizer | None:
    """The tokenizer in a checkpoint's local folder; None if it has none that can be read."""
    try:
        files = tokenizer.TOKENIZER_FILE, tokenizer.VOCABULARY_FILE
        return tokenizer.load_tokenizer(folder) if _has_one(folder, files) else None
    except UserError:
        return None


def find_difference(ours: Tokenizer, folder: str, theirs: Tokenizer) -> str | None:
    """Why the same text has other ids in the data than in a checkpoint; None if it has not.

    `theirs` is the tokenizer in the checkpoint's local folder. An id that only one of them has is
    no difference, and neither is a text that holds a token which one of them added.
    """
    if ours.fingerprint == theirs.fingerprint:
        return None
    tokens, others = _tokens_by_id(ours), _tokens_by_id(theirs)
    common = sorted(tokens.keys() & others.keys())
    for token_id in common:
        token, other = tokens[token_id], others[token_id]
        if token != other:
            return f"id {token_id} is {token!r} in the data and {other!r} in the checkpoint"
    words = [tokens[token_id] for token_id in common if tokens[token_id].isalpha()]
    has_settings = _has_one(folder, (tokenizer.TOKENIZER_FILE, tokenizer.CONFIG_FILE))
    if not has_settings and any(word != word.lower() for word in words):
        return None  # A bare vocabulary does not say how it was used; the default is lower case.
    added = {token.lower() for token in _added_tokens(ours) ^ _added_tokens(theirs)}
    texts = [text for text in _probe_texts(words) if not any(map(text.lower().__contains__, added))]
    encoded = (item.backend.encode_batch(texts) for item in (ours, theirs))
    for text, found, expected in zip(texts, *encoded, strict=True):
        if found.ids != expected.ids:
            pairs = enumerate(zip(found.ids, expected.ids, strict=False))
            at = next(place for place, (one, other) in pairs if one != other)
            shown = [f"{item.tokens[at]!r} (id {item.ids[at]})" for item in (found, expected)]
            return f"in {text!r}, {shown[0]} in the data is {shown[1]} in the checkpoint"
    return None


def _has_one(folder: str, names: tuple[str, ...]) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def _tokens_by_id(item: Tokenizer) -> dict[int, str]:
    vocabulary = item.backend.get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in vocabulary.items()}


def _added_tokens(item: Tokenizer) -> set[str]:
    return {token.content for token in item.backend.get_added_tokens_decoder().values()}


def _probe_texts(words: list[str]) -> Iterator[str]:
    """Texts out of known words, in which a difference shows; then those of any vocabulary."""
    for word in words[:: max(1, len(words) // _NUM_WORDS)]:
        yield from (word, word.upper(), word.title(), word + word, f"{word}\u0301")
        yield from (f"{word}-{word}.{word}", f"{word}\u200b{word}", f"{word}中文{word}")
        # ASCII letters in full width, which compatibility normalisation maps back.
        yield "".join(chr(ord(c) + 0xFEE0) if c.isascii() else c for c in word)
    yield from _TEXTS
