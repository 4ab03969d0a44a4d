"""Tokenizers that give the same ids pass however they were saved; others are told by an example."""

import dataclasses
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.data.vocabulary import find_difference, load_own_tokenizer
from trainer.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "vocab.txt")
BERT_NORMALIZER = {
    "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
    "strip_accents": None, "lowercase": True,
}  # fmt: skip


@pytest.fixture
def folder(minilm, tmp_path):
    """A checkpoint's folder, without its weights."""
    for name in FILES:
        shutil.copy(os.path.join(minilm, name), tmp_path)
    return str(tmp_path)


def edit(folder, **changes):
    path = os.path.join(folder, "tokenizer.json")
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    for name, value in changes.items():
        values[name] = value
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file)


def make_bare(folder, change=lambda words: words):
    """Leaves the vocabulary and config.json."""
    for name in FILES[:2]:
        os.remove(os.path.join(folder, name))
    path = os.path.join(folder, "vocab.txt")
    with open(path, encoding="utf-8") as file:
        words = file.read().splitlines()
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(change(words)) + "\n")


def compare(ours, folder):
    """The differences from ours to theirs and the other way round."""
    theirs = load_own_tokenizer(folder)
    assert theirs is not None
    return find_difference(ours, folder, theirs), find_difference(theirs, folder, ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": {
            "direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0,
        }},
        {"normalizer": BERT_NORMALIZER | {"strip_accents": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [BERT_NORMALIZER]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}]}},
        {"post_processor": {
            "type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101],
        }},
        {"decoder": None},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_other_settings_with_the_same_ids_are_no_difference(minilm, folder, changes):
    ours = load_tokenizer(minilm)
    edit(folder, **changes)
    assert compare(ours, folder) == (None, None)


def test_other_files_with_the_same_ids_are_no_difference(minilm, folder):
    ours = load_tokenizer(minilm)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
        tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk")}
        json.dump(tokens | {"do_lower_case": False, "model_max_length": 77}, file)
    assert compare(ours, folder) == (None, None)
    make_bare(folder)
    assert compare(ours, folder) == (None, None)


def test_tokens_that_one_side_added_at_the_end_are_no_difference(minilm, folder):
    ours, theirs = load_tokenizer(minilm), load_tokenizer(folder)
    theirs.backend.add_tokens(["covid", "the", "quxquux", "A-"])
    theirs.backend.add_special_tokens(["[DRUG]"])
    theirs.save(folder)
    assert load_tokenizer(folder).fingerprint != ours.fingerprint
    assert compare(ours, folder) == (None, None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": BERT_NORMALIZER | {"lowercase": False}}, "'[UNK]'"),
        ({"normalizer": BERT_NORMALIZER | {"strip_accents": False}}, "\u0301"),
        ({"normalizer": BERT_NORMALIZER | {"handle_chinese_chars": False}}, "中文"),
        ({"normalizer": BERT_NORMALIZER | {"clean_text": False}}, "\\u200b"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, BERT_NORMALIZER]}},
         "ａ"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "-"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "don't"),
    ],
    ids=["cased", "accents", "chinese", "controls", "compatibility", "blanks", "signs"],
)  # fmt: skip
def test_settings_that_change_ids_are_told_by_a_text(minilm, folder, changes, message):
    ours = load_tokenizer(minilm)
    edit(folder, **changes)
    for found in compare(ours, folder):
        assert found is not None and message in found
        assert "in the data" in found and "in the checkpoint" in found


def test_a_word_that_both_added_at_other_places_is_told(minilm, folder):
    ours, theirs = load_tokenizer(minilm), load_tokenizer(folder)
    ours.backend.add_tokens(["covid"])
    theirs.backend.add_tokens(["quxquux", "covid"])
    theirs.save(folder)
    ours = dataclasses.replace(ours, fingerprint="other")
    assert compare(ours, folder)[0] == (
        "id 30522 is 'covid' in the data and 'quxquux' in the checkpoint"
    )


def test_an_id_of_two_words_is_told(minilm, folder):
    def swap(words):
        words[1996], words[2000] = words[2000], words[1996]
        return words

    make_bare(folder, swap)
    found = compare(load_tokenizer(minilm), folder)[0]
    assert found == "id 1996 is 'the' in the data and 'to' in the checkpoint"


def test_a_vocabulary_that_was_cut_is_told(minilm, folder):
    make_bare(folder, lambda words: words[:20_000])
    assert None not in compare(load_tokenizer(minilm), folder)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_exchange_of_two_words_is_found(data):
    words = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    ours = train_tokenizer([" ".join(words)] * 3, 400)
    definition = json.loads(ours.backend.to_str())
    vocabulary = definition["model"]["vocab"]
    names = [name for name in sorted(vocabulary) if not name.startswith("[")]
    one, other = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    theirs = type(ours)(
        type(ours.backend).from_str(json.dumps(definition)),
        ours.cls_id, ours.sep_id, ours.pad_id, ours.unk_id, ours.config, "other",
    )  # fmt: skip
    first = min((one, other), key=vocabulary.__getitem__)
    found = find_difference(ours, "", theirs)
    assert found is not None and found.startswith(f"id {vocabulary[first]} is ")


def test_a_bare_vocabulary_with_capitals_does_not_say_how_it_was_used(tmp_path):
    """`transformers` reads it in lower case, as it does that of a cased checkpoint."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "cat", "Cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    theirs = load_own_tokenizer(str(tmp_path))
    definition = json.loads(theirs.backend.to_str())
    definition["normalizer"]["lowercase"] = False
    ours = type(theirs)(
        type(theirs.backend).from_str(json.dumps(definition)),
        theirs.cls_id, theirs.sep_id, theirs.pad_id, theirs.unk_id, theirs.config, "cased",
    )  # fmt: skip
    assert ours.backend.encode("The Cat").ids != theirs.backend.encode("The Cat").ids
    assert find_difference(ours, str(tmp_path), theirs) is None
    theirs.save(str(tmp_path))
    assert find_difference(ours, str(tmp_path), theirs) is not None


def test_a_folder_without_a_vocabulary_has_no_tokenizer(folder, tmp_path):
    for name in ("tokenizer.json", "vocab.txt"):
        os.remove(os.path.join(folder, name))
    assert load_own_tokenizer(folder) is None
    # `transformers` would make a tokenizer of the special tokens alone.
    with pytest.raises(UserError, match="has no vocabulary"):
        load_tokenizer(folder)
    (tmp_path / "tokenizer.json").write_text("{")
    assert load_own_tokenizer(folder) is None
