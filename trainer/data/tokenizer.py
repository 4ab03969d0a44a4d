"""Text to WordPiece ids through the Rust `tokenizers`, and the checks of ids that rows bring along.

All functions work on the backend of a Hugging Face tokenizer; `transformers` only finds and
converts one. Documents are cut here, so that `prepare` and `score` cut them in the same way.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend

from trainer.errors import UserError
from trainer.model_config import MAX_VOCABULARY
from trainer.storage import filesystem
from trainer.storage.own_files import MAX_BYTES, check_plain_files, load

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"
CONTINUATION = "##"
_MIN_PAIR_COUNT = 2
_MAX_ALPHABET = 1000
# Generous: a token of English has four or five.
_CHARACTERS_A_TOKEN = 8
_WORD_CHARACTERS = 200
# Of a text that has to be tokenised in one piece: up to 2 GB of memory.
_MAX_WHOLE_CHARACTERS = 1 << 22
_BLANK = re.compile(r"\s")
_TOKEN_NAMES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of single documents: [CLS], WordPieces, [SEP].

    The backend pickles; its padding and truncation are off. `unk_id` stands for what the vocabulary
    does not know. `config` is tokenizer_config.json, for `transformers`. Tokenizers of equal
    fingerprints (SHA-256 of the backend's definition, hex) give equal ids.
    """

    backend: Backend
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int | None
    config: dict[str, Any]
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included: the rows that embeddings need."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_windows(
        self, texts: list[str], max_seq_length: int, window_stride: int, max_windows: int
    ) -> tuple[list[list[list[int]]], list[bool]]:
        """Tokenises N documents into windows, which overlap if the stride is short.

        A document that fits into `max_seq_length` tokens, [CLS] and [SEP] included, is one window;
        window n of a longer one holds the tokens from n * window_stride on, where 0 stands for the
        longest stride. The last window is the first that reaches the document's end; tokens after
        `max_windows` windows are lost. These are the windows of the Rust library's truncation with
        overflow. They are cut here because the library keeps its lengths in the tokenizer, and one
        `Tokenizer` serves several.

        Returns N lists of windows of ids [CLS] ... [SEP]; N flags, true where tokens were lost.
        """
        room = max_seq_length - 2
        stride = window_stride or room
        documents: list[list[list[int]]] = []
        lost = []
        for ids in self._encode_beginnings(texts, max_seq_length + (max_windows - 1) * stride):
            if len(ids) <= max_seq_length:
                documents.append([ids])
                lost.append(False)
                continue
            # Windows beside the first until one reaches the end, of len(ids) - 2 tokens of text.
            needed = 1 - (max_seq_length - len(ids)) // stride
            starts = range(1, 1 + min(needed, max_windows) * stride, stride)
            texts_of = (ids[at : min(at + room, len(ids) - 1)] for at in starts)
            documents.append([[self.cls_id, *text, self.sep_id] for text in texts_of])
            lost.append(needed > max_windows)
        return documents, lost

    def _encode_beginnings(self, texts: list[str], num_tokens: int) -> list[list[int]]:
        """The ids of texts; of a long text those of a beginning of more than `num_tokens` tokens.

        So a text of a million words costs no more than the tokens that are used.
        """
        size = _CHARACTERS_A_TOKEN * num_tokens + _WORD_CHARACTERS
        pieces = [self._next_piece(text, 0, size) for text in texts]
        encodings = self.backend.encode_batch_fast([piece for piece, _ in pieces])
        ids = [encoding.ids for encoding in encodings]
        for index, (text, (_, end)) in enumerate(zip(texts, pieces, strict=True)):
            while end < len(text) and len(ids[index]) <= num_tokens:
                piece, end = self._next_piece(text, end, size)
                (encoding,) = self.backend.encode_batch_fast([piece])
                ids[index] = [*ids[index][:-1], *encoding.ids[1:]]
        return ids

    def _next_piece(self, text: str, start: int, size: int) -> tuple[str, int]:
        """What has the tokens of a text from `start` up to a place, and that place.

        It has at most `size` characters where the text can be cut so early; else overlong words are
        shortened. The library takes up to 500 bytes a character, so very long ones are refused.
        """
        if len(text) - start > size and self.splits_at_blanks:
            cut = max(text.rfind(blank, start + 1, start + size) for blank in " \n\t")
            if cut > 0:  # Before the rest is copied: there may be thousands of pieces.
                return text[start:cut], cut
        if len(text) - start > size and self.splits_at_blanks and self._characters is not None:
            piece, end = self._characters.cut(text, start, size)
        else:
            piece, end = text[start:], len(text)
        if len(piece) > max(size, _MAX_WHOLE_CHARACTERS):
            raise UserError(
                f"a text of {len(text):,} characters ({text[:40]!a}...) that this tokenizer cannot "
                f"read in pieces; expected at most {_MAX_WHOLE_CHARACTERS:,}; shorten it"
            )
        return piece, end

    @functools.cached_property
    def _characters(self) -> "_Characters | None":
        """Where a text without blanks may be cut; None if that is not known."""
        added = self.backend.get_added_tokens_decoder().values()
        found = _Characters(self.backend, [token.content for token in added])
        # Others may be found within a word, or depend on what stands beside them.
        is_known = isinstance(self.backend.model, tokenizers.models.WordPiece) and not any(
            token.normalized or token.single_word or found[ord(token.content[0])] in "wv"
            for token in added
        )
        return found if is_known else None

    @functools.cached_property
    def splits_at_blanks(self) -> bool:
        """Whether the ids of the text before a blank do not depend on what follows, as BERT's."""
        added = self.backend.get_added_tokens_decoder().values()
        return (
            isinstance(self.backend.normalizer, tokenizers.normalizers.BertNormalizer)
            and isinstance(self.backend.pre_tokenizer, tokenizers.pre_tokenizers.BertPreTokenizer)
            and not any(_BLANK.search(token.content) for token in added)
        )

    def save(self, folder: str, model_max_length: int | None = None) -> None:
        """Writes the files from which `transformers.AutoTokenizer` makes the same tokenizer.

        `transformers` truncates at `model_max_length` tokens. The folder is made if it does not
        exist.
        """
        os.makedirs(folder, exist_ok=True)
        self.backend.save(os.path.join(folder, TOKENIZER_FILE))
        config = dict(self.config)
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        _write(os.path.join(folder, CONFIG_FILE), json.dumps(config, indent=2, sort_keys=True))
        tokens = {name: config[name] for name in _TOKEN_NAMES if name in config}
        _write(os.path.join(folder, "special_tokens_map.json"), json.dumps(tokens, indent=2))
        if isinstance(self.backend.model, tokenizers.models.WordPiece):
            vocabulary = self.backend.get_vocab(with_added_tokens=False)
            tokens_by_id = sorted(vocabulary, key=vocabulary.__getitem__)
            _write(os.path.join(folder, VOCABULARY_FILE), "\n".join(tokens_by_id))


class _Characters(dict[int, str]):
    """What characters are to BERT's tokenizer, by code point: found out when one is met.

    b: the text before it does not depend on it, as before a blank, punctuation, CJK. w: a letter.
    v: vanishes, as controls and accents do. m: a mark that stays where accents are stripped, and
    may change its place among them. p: any other, as the bracket within "[SEP]".
    """

    def __init__(self, backend: Backend, added_tokens: Sequence[str]) -> None:
        super().__init__()
        self._normalizer, self._pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self._strips_accents = self._normalizer.normalize_str("e\u0301") == "e"
        self._within_tokens = "".join(token[1:] for token in added_tokens)
        self._longest_token = max(map(len, added_tokens), default=0)
        self._longest_word = getattr(backend.model, "max_input_chars_per_word", 0)
        self._long_run = re.compile(f"[wv]{{{self._longest_token + self._longest_word + 2},}}")

    def __missing__(self, code: int) -> str:
        character, kind = chr(code), "p"
        text = self._normalizer.normalize_str(f"a{character}a")
        pieces = [piece for piece, _ in self._pre_tokenizer.pre_tokenize_str(text)]
        if pieces == ["aa"]:
            kind = "v"
        elif self._strips_accents and any(map(unicodedata.combining, text)):
            kind = "m"
        elif len(pieces) == 1:
            kind = "w"
        elif pieces[0] == "a" and character not in self._within_tokens:
            kind = "b"
        self[code] = kind
        return kind

    def cut(self, text: str, start: int, size: int) -> tuple[str, int]:
        """`Tokenizer._next_piece` of a text without blanks."""
        kinds = text[start : start + size].translate(self)
        end = kinds.rfind("b", 1)
        while end < 0 and (at := start + len(kinds)) < len(text):
            kinds += text[at : at + len(kinds)].translate(self)
            end = kinds.find("b", 1)
        text = text[start : start + end] if end > 0 else text[start:]
        pieces, done = [], 0
        # Marks that vanish may keep those that stay in their order.
        runs = () if "m" in kinds else self._long_run.finditer(kinds, 0, len(text))
        for run in runs:
            # An added token may reach into the run's beginning. A longer word is [UNK] as well.
            head = run.start() + self._longest_token
            letters = (text[i] for i in range(head, run.end()) if kinds[i] == "w")
            pieces += [text[done:head], *itertools.islice(letters, self._longest_word + 1)]
            done = run.end()
        return "".join([*pieces, text[done:]]), start + len(text)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text + "\n")


def _wrap(backend: Backend, config: dict[str, Any], name: str) -> Tokenizer:
    """A `Tokenizer` around a backend; UserError unless it frames a text by [CLS] and [SEP]."""
    backend.no_padding()
    backend.no_truncation()
    tokens = [_content(config.get(key)) for key in ("cls_token", "sep_token", "pad_token")]
    cls_id, sep_id, pad_id = (token and backend.token_to_id(token) for token in tokens)
    unk_token = _content(config.get("unk_token"))
    frame = backend.encode("a", add_special_tokens=True).ids
    is_framed = len(frame) > 2 and [frame[0], frame[-1]] == [cls_id, sep_id]
    if not is_framed or not isinstance(pad_id, int):
        raise UserError(
            f"--tokenizer={name}: expected a BERT tokenizer, one with [CLS], [SEP] and [PAD] that "
            f"frames a text by the first two; found {reprlib.repr(tokens)}; name "
            "another one or `train`"
        )
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest >= MAX_VOCABULARY:
        raise UserError(f"--tokenizer={name}: has id {largest}, expected below {MAX_VOCABULARY}")
    unk_id = None if unk_token is None else backend.token_to_id(unk_token)
    definition = json.dumps(json.loads(backend.to_str()), sort_keys=True)
    fingerprint = hashlib.sha256(definition.encode()).hexdigest()
    return Tokenizer(backend, frame[0], frame[-1], pad_id, unk_id, config, fingerprint)


def _content(token: Any) -> str | None:
    """A special token's text: configs hold it bare or as a dictionary; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def load_tokenizer(name_or_folder: str) -> Tokenizer:
    """Loads a tokenizer by hub id, or from a folder that `save` or `save_pretrained` wrote.

    A URL has to hold tokenizer.json and tokenizer_config.json; older layouts load locally only.
    UserError if there is no such tokenizer, or it does not frame a text by [CLS] and [SEP].
    """
    config_path = os.path.join(name_or_folder, CONFIG_FILE)
    tokenizer_path = os.path.join(name_or_folder, TOKENIZER_FILE)
    if filesystem.exists(config_path) and filesystem.exists(tokenizer_path):
        config = load(dict[str, Any], config_path, "restore it")
        definition = filesystem.read_bytes(tokenizer_path, MAX_BYTES)
        try:
            return _wrap(Backend.from_buffer(definition), config, name_or_folder)
        except BaseException as error:  # `tokenizers` raises bare Exception, and panics.
            is_its_own = isinstance(error, Exception) or type(error).__name__ == "PanicException"
            if not is_its_own or isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{name_or_folder}: not a readable tokenizer ({reason})") from None
    if filesystem.is_remote(name_or_folder):
        raise UserError(f"{name_or_folder}: no {TOKENIZER_FILE} with {CONFIG_FILE}; check the URL")
    if name_or_folder.startswith((".", os.path.sep)) and not os.path.isdir(name_or_folder):
        raise UserError(f"--tokenizer={name_or_folder}: no such folder; check the path")
    if os.path.isdir(name_or_folder):
        check_plain_files(name_or_folder)
    return _convert(name_or_folder)


def _convert(name: str) -> Tokenizer:
    """Loads a tokenizer by `transformers`, which knows the hub and the older file layouts."""
    import transformers

    try:
        slow_or_fast = transformers.AutoTokenizer.from_pretrained(name)
        backend = Backend.from_str(slow_or_fast.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--tokenizer={name}: cannot be loaded ({reason}); expected a folder with "
            f"{TOKENIZER_FILE}, or {VOCABULARY_FILE} and config.json, a hub id, or `train`"
        ) from None
    if backend.get_vocab_size() <= len(SPECIAL_TOKENS):  # Without files `transformers` makes one.
        raise UserError(
            f"--tokenizer={name}: has no vocabulary; expected a folder with {TOKENIZER_FILE} or "
            f"{VOCABULARY_FILE}, a hub id, or `train`"
        )
    config = {key: str(getattr(slow_or_fast, key)) for key in _TOKEN_NAMES}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return _wrap(backend, config, name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains BERT's lower-case WordPiece; the same texts always give the same vocabulary.

    `texts` are iterated twice. `vocab_size` includes the special tokens and the alphabet.
    """
    backend = _make_backend({})
    alphabet, left_out = _choose_alphabet(
        texts, backend.normalizer.normalize_str, (vocab_size - len(SPECIAL_TOKENS)) // 4
    )
    # The library's trainer numbers the letters in the order of a randomly seeded hash map, and
    # chooses between equally frequent pairs by those numbers. Letters that are named beforehand
    # have fixed numbers, so the vocabulary is the same in every process.
    letters = [*alphabet, *(CONTINUATION + letter for letter in alphabet)]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_PAIR_COUNT,
        special_tokens=[*SPECIAL_TOKENS, *letters],
        show_progress=False,
    )
    blanks = str.maketrans(dict.fromkeys(left_out, " "))
    backend.train_from_iterator((text.translate(blanks) for text in texts), trainer)
    return _from_vocabulary(backend.get_vocab(with_added_tokens=True))


def _choose_alphabet(
    texts: Iterable[str], normalize: Callable[[str], str], max_letters: int
) -> tuple[list[str], list[str]]:
    """The most frequent letters after normalisation, sorted; the characters that give others."""
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    # BERT's normalisation goes character by character, so each one is normalised once.
    letters_of = {character: "".join(normalize(character).split()) for character in characters}
    counts: Counter[str] = Counter()
    for character, letters in letters_of.items():
        for letter in letters:
            counts[letter] += characters[character]
    ranked = sorted(counts, key=lambda letter: (-counts[letter], letter))
    alphabet = set(ranked[: min(max_letters, _MAX_ALPHABET)])
    return sorted(alphabet), [c for c in characters if not alphabet.issuperset(letters_of[c])]


def _make_backend(vocabulary: dict[str, int]) -> Backend:
    backend = Backend(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return backend


def _from_vocabulary(vocabulary: dict[str, int]) -> Tokenizer:
    """BERT's lower-case tokenizer with this vocabulary, its special tokens marked as such."""
    backend = _make_backend(vocabulary)
    backend.decoder = tokenizers.decoders.WordPiece(prefix=CONTINUATION)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokens = {name: f"[{name.removesuffix('_token').upper()}]" for name in _TOKEN_NAMES}
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | tokens
    return _wrap(backend, config, "train")


@dataclass(frozen=True)
class TokenLimits:
    """The limits of token ids (below `vocab_size`) and windows, [CLS] and [SEP] included."""

    cls_id: int
    sep_id: int
    vocab_size: int
    max_seq_length: int
    max_windows: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_seq_length: int, max_windows: int) -> "TokenLimits":
        """The limits that a tokenizer and the shape of documents set."""
        ids = tokenizer.cls_id, tokenizer.sep_id
        return cls(*ids, tokenizer.vocab_size, max_seq_length, max_windows)


def check_windows(windows: Sequence[Sequence[int]], limits: TokenLimits) -> str | None:
    """Why a row's windows cannot be used; None if they can."""
    if not 1 <= len(windows) <= limits.max_windows:
        return f"{len(windows)} windows, expected 1 to {limits.max_windows} (--max_windows)"
    for window in windows:
        if len(window) > limits.max_seq_length:
            return (
                f"a window of {len(window)} tokens, expected at most {limits.max_seq_length} "
                "(--max_seq_length)"
            )
        if len(window) < 2 or (window[0], window[-1]) != (limits.cls_id, limits.sep_id):
            return (
                f"a window that is not framed by [CLS] ({limits.cls_id}) and [SEP] "
                f"({limits.sep_id}): another tokenizer?"
            )
        if min(window) < 0 or max(window) >= limits.vocab_size:
            return (
                f"token ids from {min(window)} to {max(window)}, expected 0 to "
                f"{limits.vocab_size - 1}: another tokenizer?"
            )
    return None
