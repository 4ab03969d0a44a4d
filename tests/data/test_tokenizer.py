"""Tokenizer: the same ids as transformers, our own cutting, vocabularies that are reproducible."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import encode

from trainer.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from trainer.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Tokenisers tokenise tokens; the tokenised token is a token.",
    "Ünïcödé, 漢字 and émigrés: naïve?",
] * 3


WORDS = [f"w{first}{second}" for first in "abcdefghijkl" for second in "mnopqrstuv"]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """BERT's tokenizer with a small vocabulary."""
    return train_tokenizer(TEXTS, 200)


@pytest.fixture(scope="module")
def numbered() -> Tokenizer:
    """A tokenizer to which each of WORDS is one token."""
    tokenizer = train_tokenizer(TEXTS, 200)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer.backend.model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    return tokenizer


def test_ids_are_those_of_transformers(minilm, real_texts):
    import transformers

    tokenizer = load_tokenizer(minilm)
    peer = transformers.AutoTokenizer.from_pretrained(minilm)
    for max_seq_length in (8, 128, 512):
        documents, truncated = tokenizer.encode_windows(real_texts, max_seq_length, 0, 1)
        expected = peer(real_texts, truncation=True, max_length=max_seq_length)["input_ids"]
        whole = peer(real_texts, truncation=False)["input_ids"]
        assert documents == [[ids] for ids in expected]
        assert truncated == [len(document) > max_seq_length for document in whole]
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (30522, 0)
    assert (tokenizer.cls_id, tokenizer.sep_id) == (101, 102)


@pytest.mark.parametrize("max_seq_length, window_stride", [(8, 0), (8, 1), (128, 0), (128, 63)])
def test_windows_are_those_of_the_librarys_truncation(
    minilm, real_texts, max_seq_length, window_stride
):
    tokenizer, texts = load_tokenizer(minilm), real_texts[:60]
    found, lost = tokenizer.encode_windows(texts, max_seq_length, window_stride, 10_000)
    peer = load_tokenizer(minilm).backend
    room = max_seq_length - 2
    peer.enable_truncation(max_seq_length, stride=room - (window_stride or room))
    expected = [
        [encoding.ids, *(window.ids for window in encoding.overflowing)]
        for encoding in peer.encode_batch(texts)
    ]
    assert found == expected and not any(lost)
    # The first ones are the same however few there may be.
    for max_windows in (1, 3):
        found, lost = tokenizer.encode_windows(texts, max_seq_length, window_stride, max_windows)
        assert found == [windows[:max_windows] for windows in expected]
        assert lost == [len(windows) > max_windows for windows in expected]


PIECES = [
    *TEXTS, "x" * 250, "Caf\u00e9", "\u03a3\u039f\u03a3", "\u6f22\u5b57", "[MASK]", "don't", ".",
    "\u0301", " \u0301", "\u00a0", "\u2003", "\n", "\t", "  ", "a b", "\ufffd", "\u200d",
    "\U0001f600",
]  # fmt: skip


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=80).map("".join),
    times=st.integers(1, 40),
    max_seq_length=st.integers(8, 24),
    stride=st.integers(0, 6),
    max_windows=st.integers(1, 3),
)
@settings(max_examples=300, deadline=None)
def test_long_texts_have_the_windows_of_whole_ones(
    small, text, times, max_seq_length, stride, max_windows
):
    """Only a beginning of a long text is tokenised; where that is too short, all of it."""
    assert small.splits_at_blanks
    whole = dataclasses.replace(small)
    whole.__dict__["splits_at_blanks"] = False
    arguments = [text * times, text], max_seq_length, stride, max_windows
    assert small.encode_windows(*arguments) == whole.encode_windows(*arguments)


def test_of_a_long_text_only_a_beginning_is_tokenised(small, monkeypatch):
    seen = []

    class Backend:
        def encode_batch_fast(self, texts):
            seen.extend(map(len, texts))
            return small.backend.encode_batch_fast(texts)

    text = "the token " * 100_000
    small.splits_at_blanks  # noqa: B018  # Of the real backend, before it is replaced.
    watched = dataclasses.replace(small, backend=Backend())
    watched.__dict__["splits_at_blanks"] = True
    assert watched.encode_windows([text], 16, 0, 2) == small.encode_windows([text], 16, 0, 2)
    assert len(seen) == 1 and seen[0] < 500


@given(
    words=st.integers(0, 120),
    max_seq_length=st.integers(8, 40),
    stride=st.integers(0, 38),
    max_windows=st.integers(1, 9),
)
@settings(max_examples=300, deadline=None)
def test_windows_cover_a_document_and_overlap_as_the_stride_says(
    numbered, words, max_seq_length, stride, max_windows
):
    stride = min(stride, max_seq_length - 2)
    text = " ".join(WORDS[:words])
    (windows,), (is_lost,) = numbered.encode_windows([text], max_seq_length, stride, max_windows)
    whole = encode(numbered, [text], 1 << 20)[0][1:-1]
    assert len(whole) == len(set(whole)) == words
    assert 1 <= len(windows) <= max_windows
    for number, window in enumerate(windows):
        assert window[0] == numbered.cls_id and window[-1] == numbered.sep_id
        assert len(window) <= max_seq_length
        first = number * (stride or max_seq_length - 2)
        assert window[1:-1] == whole[first : first + max_seq_length - 2]
    assert all(len(window) == max_seq_length for window in windows[:-1])
    covered = {token for window in windows for token in window[1:-1]}
    assert is_lost == (len(covered) < words)
    assert not is_lost or len(windows) == max_windows
    # No window comes after the one that reaches the end.
    assert len(windows) == 1 or whole[-1] not in windows[-2]


def test_saved_files_make_the_same_tokenizer(minilm, real_texts, tmp_path):
    import transformers

    for name, tokenizer in (
        ("pretrained", load_tokenizer(minilm)),
        ("trained", train_tokenizer(real_texts, 2000)),
    ):
        folder = str(tmp_path / name)
        tokenizer.save(folder, model_max_length=64)
        again = load_tokenizer(folder)
        assert again.fingerprint == tokenizer.fingerprint
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        assert peer.model_max_length == 64
        expected = encode(tokenizer, real_texts, 64)
        assert encode(again, real_texts, 64) == expected
        assert peer(real_texts, truncation=True)["input_ids"] == expected


def test_padding_and_truncation_of_a_file_do_not_count(minilm, tmp_path):
    with open(f"{minilm}/tokenizer.json", encoding="utf-8") as file:
        definition = json.load(file)
    assert definition["truncation"]["max_length"] == 128
    tokenizer = load_tokenizer(minilm)
    documents, truncated = tokenizer.encode_windows(["word " * 300, "word"], 512, 0, 1)
    assert [[len(window) for window in windows] for windows in documents] == [[302], [3]]
    assert truncated == [False, False]


def test_a_folder_with_a_bare_vocabulary_loads(minilm, real_texts, tmp_path):
    with open(f"{minilm}/vocab.txt", encoding="utf-8") as file:
        (tmp_path / "vocab.txt").write_text(file.read(), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ids = encode(load_tokenizer(str(tmp_path)), real_texts, 512)
    assert ids == encode(load_tokenizer(minilm), real_texts, 512)


def test_training_gives_the_same_vocabulary_in_every_process():
    # The library's own trainer does not: it numbers letters in a randomly seeded hash map's order.
    program = (
        "from trainer.data.tokenizer import train_tokenizer\n"
        f"print(train_tokenizer({TEXTS!r}, 200).fingerprint)"
    )
    expected = train_tokenizer(TEXTS, 200).fingerprint
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr


def test_a_trained_vocabulary_covers_its_texts():
    tokenizer = train_tokenizer(TEXTS, 300)
    vocabulary = tokenizer.backend.get_vocab()
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == len(vocabulary) <= 300
    ids = encode(tokenizer, [text.upper() for text in TEXTS], 512)
    assert all(vocabulary["[UNK]"] not in document for document in ids)
    assert encode(tokenizer, ["the token"], 512) == [[2, vocabulary["the"], vocabulary["token"], 3]]


def test_a_small_vocabulary_leaves_out_the_rarest_letters():
    texts = ["abc abc abc", "".join(map(chr, range(0x4E00, 0x4E00 + 500)))]
    tokenizer = train_tokenizer(texts, 128)
    vocabulary = tokenizer.backend.get_vocab()
    assert tokenizer.vocab_size <= 128
    assert "abc" in vocabulary
    assert encode(tokenizer, ["abc \u4fff"], 8) == [[2, vocabulary["abc"], 1, 3]]


@pytest.mark.parametrize("broken", ["nothing", "not BERT's", "not JSON"])
def test_what_is_no_tokenizer_of_berts_kind_is_told(tmp_path, broken):
    if broken != "nothing":
        tokenizer = train_tokenizer(TEXTS, 200)
        tokenizer.save(str(tmp_path))
    if broken == "not BERT's":
        (tmp_path / "tokenizer_config.json").write_text('{"cls_token": "<s>"}')
    if broken == "not JSON":
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))
