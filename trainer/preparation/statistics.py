"""What the second pass of `prepare` counts: lengths, labels, unknown tokens, unknown scripts.

A script (Latin, Cyrillic, ...) may be unknown to a vocabulary without a single [UNK]: vocabularies
hold the letters of scripts whose words they do not hold, and such a text becomes one token a
letter. So scripts are counted as well.
"""

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from trainer.data.tokenizer import CONTINUATION, Tokenizer

# A script is known if so many pieces of the vocabulary have two or more letters, all of them in it,
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
    # A small vocabulary may have enough of no script; it knows its commonest one.
    known = {script for script, count in pieces.items() if count >= enough[script]}
    return frozenset(known or (script for script, _ in pieces.most_common(1)))


def unknown_script(text: str, known: frozenset[str]) -> str | None:
    """A text's commonest unknown script, if over half of its first letters are in unknown ones."""
    head = text[:LOOKED_AT_CHARACTERS]
    if "LATIN" in known:
        # This decides for nearly all Latin texts, at a tenth of the cost of counting.
        ascii_characters = head.encode("ascii", "ignore")
        num_letters = len(ascii_characters.translate(None, _ASCII_BUT_LETTERS))
        if len(head) - len(ascii_characters) <= num_letters:
            return None
    scripts = count_scripts(head)
    unknown = Counter({script: n for script, n in scripts.items() if script not in known})
    return unknown.most_common(1)[0][0] if 2 * unknown.total() > scripts.total() else None


@dataclass
class SplitStatistics:
    """Counts of some documents, for each of S splits.

    Attributes:
      length_histogram: int64 [S, max_seq_length + 1], windows by their tokens.
      window_histogram: int64 [S, max windows + 1], documents by their windows.
      truncated: int64 [S], documents that lost tokens.
      unknown_tokens: int64 [S], [UNK] in all windows.
      scripts: documents mostly in scripts that the vocabulary does not know, by script.
      label_counts: int64 [S, L].
      max_labels: int64 [S], the greatest number of labels of a document.
    """

    length_histogram: np.ndarray
    window_histogram: np.ndarray
    truncated: np.ndarray
    unknown_tokens: np.ndarray
    scripts: list[Counter[str]]
    label_counts: np.ndarray
    max_labels: np.ndarray

    def add_documents(
        self,
        splits: np.ndarray,
        documents: Sequence[Sequence[list[int]]],
        lost: Sequence[bool],
        unknown_id: int | None,
    ) -> None:
        """Counts N documents: splits (int [N]), windows of ids, whether tokens were lost."""
        windows = [window for document in documents for window in document]
        counts = np.array([len(document) for document in documents])
        splits_of_windows = np.repeat(splits, counts)
        lengths = np.array([len(window) for window in windows])
        np.add.at(self.length_histogram, (splits_of_windows, lengths), 1)
        self.window_histogram = _widened(self.window_histogram, int(counts.max()) + 1)
        np.add.at(self.window_histogram, (splits, counts), 1)
        unknown = [window.count(unknown_id) for window in windows]  # type: ignore[arg-type]
        np.add.at(self.unknown_tokens, splits_of_windows, unknown)

        np.add.at(self.truncated, splits, lost)

    def add_scripts(self, splits: np.ndarray, scripts: Sequence[str | None]) -> None:
        """Counts the unknown scripts of N documents, None for those in known ones."""
        for split, script in zip(splits.tolist(), scripts, strict=True):
            if script is not None:
                self.scripts[split][script] += 1

    def add_labels(self, splits: np.ndarray, label_offsets: np.ndarray, labels: np.ndarray) -> None:
        """Counts the labels of N documents, ragged, as [N + 1] bounds and [M] indices."""
        counts = np.diff(label_offsets)
        np.add.at(self.label_counts, (np.repeat(splits, counts), labels), 1)
        np.maximum.at(self.max_labels, splits, counts)

    def merge(self, other: "SplitStatistics") -> None:
        """Adds the counts of further documents."""
        self.length_histogram += other.length_histogram
        width = max(self.window_histogram.shape[1], other.window_histogram.shape[1])
        self.window_histogram = _widened(self.window_histogram, width)
        self.window_histogram += _widened(other.window_histogram, width)
        self.truncated += other.truncated
        self.unknown_tokens += other.unknown_tokens
        for scripts, more in zip(self.scripts, other.scripts, strict=True):
            scripts.update(more)
        self.label_counts += other.label_counts
        self.max_labels = np.maximum(self.max_labels, other.max_labels)


def no_documents(num_splits: int, max_seq_length: int, num_labels: int) -> SplitStatistics:
    """The statistics of no documents."""
    return SplitStatistics(
        length_histogram=np.zeros((num_splits, max_seq_length + 1), np.int64),
        window_histogram=np.zeros((num_splits, 2), np.int64),
        truncated=np.zeros(num_splits, np.int64),
        unknown_tokens=np.zeros(num_splits, np.int64),
        scripts=[Counter() for _ in range(num_splits)],
        label_counts=np.zeros((num_splits, num_labels), np.int64),
        max_labels=np.zeros(num_splits, np.int64),
    )


def _widened(histogram: np.ndarray, width: int) -> np.ndarray:
    missing = max(width - histogram.shape[1], 0)
    return np.pad(histogram, ((0, 0), (0, missing)))
