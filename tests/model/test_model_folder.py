"""Model folders of every kind of model: transformers, the SavedModel, our loader and a formula."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorflow as tf
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, dynamic_module_utils

from trainer import export, model_config
from trainer.data.packing import pack
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.linear.term_features import hash_pairs
from trainer.model.folder_writer import save_model_folder
from trainer.model.model import build_model
from trainer.model.model_folder import load_model_folder
from trainer.model.pretrained import load_pretrained
from trainer.model_config import ModelConfig, PackingConfig

NUM_LABELS = 7
PACKING = PackingConfig(((2, 32), (3, 64)), 6, 9)
# (head, wide, rank of the wide part, pooling of windows)
KINDS = {
    "cls": ("cls", "none", 0, "max"),
    "cls-wide": ("cls", "wordpieces", 0, "attention"),
    "mean": ("mean", "none", 0, "max"),
    "mean-wide": ("mean", "wordpieces", 0, "attention"),
    "mean-wide-rank": ("mean", "wordpieces", 5, "mean"),
    "label_attention": ("label_attention", "none", 0, "max"),
    "label_attention-wide": ("label_attention", "wordpieces", 0, "attention"),
    "label_attention-wide-rank": ("label_attention", "wordpieces", 5, "max"),
}
# Kinds whose wide part has pairs of tokens too, in few buckets, so that some are shared.
WITH_PAIRS, PAIRS = ("mean-wide", "mean-wide-rank", "label_attention-wide"), 64
SCALE, SHIFT = np.linspace(0.5, 1.5, NUM_LABELS), np.linspace(-1, 1, NUM_LABELS)


def sizes_of(kind, vocab_size):
    head, wide, _, pooling = KINDS[kind]
    return ModelConfig(
        vocab_size,
        NUM_LABELS,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        head=head,
        wide=wide,
        wide_pairs=PAIRS if kind in WITH_PAIRS else 0,
        window_pooling=pooling,
    )


def set_rank(monkeypatch, kind):
    """Makes the limit of one table so small that this kind has two, of its rank."""
    rank = KINDS[kind][2]
    if rank:
        monkeypatch.setattr(model_config, "MAX_WIDE_PARAMETERS", 1)
        monkeypatch.setattr(model_config, "WIDE_RANK", rank)


@pytest.fixture(autouse=True)
def own_code_folder(tmp_path, monkeypatch):
    """Where transformers keeps the code that it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def warnings(caplog):
    """What transformers warns of; its logger keeps that to itself otherwise."""
    transformers.utils.logging.enable_propagation()
    yield lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("transformers") and record.levelname in ("WARNING", "ERROR")
    ]
    transformers.utils.logging.disable_propagation()


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """Of each kind: the folder, and the values of its variables before the calibration."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = load_tokenizer(os.path.join(corpus, "tokenizer"))
    made = {}
    for kind in KINDS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_rank(monkeypatch, kind)
            model = build_model(sizes_of(kind, tokenizer.vocab_size), seed=3)
            rng = np.random.default_rng(4)
            for name, variable in model.named_variables().items():
                variable.assign(variable + rng.normal(0, 0.2, variable.shape))
                if name == "wide/idf":
                    idf = rng.uniform(0.5, 5, variable.shape)
                    idf[[tokenizer.cls_id, tokenizer.sep_id]] = 0
                    variable.assign(idf)
            before = {
                name: variable.numpy().astype(np.float64)
                for name, variable in model.named_variables().items()
            }
            export._fold(model, SCALE.tolist(), SHIFT.tolist())
            folder = str(root / kind)
            os.makedirs(folder)
            description = {
                "labels": [f"label {i}" for i in range(NUM_LABELS)],
                "head": model.config.head,
                "wide": model.config.wide,
                "wide_pairs": model.config.wide_pairs,
                "window_pooling": model.config.window_pooling,
                "max_seq_length": 32,
                "max_windows": 3,
                "window_stride": 10,
                "packing": vars(PACKING),
                "thresholds": [0.5] * NUM_LABELS,
                "fingerprints": {"tokenizer": tokenizer.fingerprint},
            }
            save_model_folder(folder, model, tokenizer, PACKING, description, has_onnx=True)
        made[kind] = folder, before
    return made


@pytest.fixture(scope="module")
def texts(real_texts):
    """Texts of one window of at most 32 tokens, some with words that repeat, and of several."""
    short = ["", "two words", "the the the array", *(t[:60] for t in real_texts[:4])]
    return short, [real_texts[0][:150], real_texts[1][:200]]


def formula(values, kind, hidden, documents):
    """Calibrated float64 logits of documents from their windows' states and token ids."""
    head, wide, rank, pooling = KINDS[kind]
    kernel, bias = values["head/classifier/kernel"], values["head/classifier/bias"]
    rows = []
    for states, windows in zip(hidden, documents, strict=True):
        if head == "label_attention":
            tokens = np.concatenate(states)
            scores = tokens @ values["head/query/kernel"]
            attention = np.exp(scores - scores.max(axis=0))
            vectors = (attention / attention.sum(axis=0)).T @ tokens
            logits = (vectors * kernel.T).sum(axis=1) + bias
        else:
            if head == "cls":
                pooler = values["head/pooler/kernel"], values["head/pooler/bias"]
                vectors = np.stack([np.tanh(s[0] @ pooler[0] + pooler[1]) for s in states])
            else:
                vectors = np.stack([s.mean(axis=0) for s in states])
            if pooling == "max":
                vector = vectors.max(axis=0)
            else:
                query = values.get("head/window_pooling/query", np.zeros((vectors.shape[1], 1)))
                weights = np.exp(vectors @ query[:, 0])
                vector = weights @ vectors / weights.sum()
            logits = vector @ kernel + bias
        if wide != "none":
            terms = [np.asarray(window, np.int64) for window in windows]
            if kind in WITH_PAIRS:
                # The vocabulary's tokens come before the buckets.
                before = len(values["wide/idf"]) - PAIRS
                terms += [before + hash_pairs(w[:-1], w[1:], PAIRS) for w in terms]
            ids, counts = np.unique(np.concatenate(terms), return_counts=True)
            features = (1 + np.log(counts)) * values["wide/idf"][ids]
            features /= max(np.linalg.norm(features), 1e-15)
            table = values["wide/terms"] @ values["wide/kernel"] if rank else values["wide/kernel"]
            mix = values["wide/mix"]
            logits = mix[0] * logits + mix[1] * (features @ table[ids] + values["wide/bias"])
        rows.append(logits * SCALE + SHIFT)
    return np.stack(rows)


def pad(windows, side="right"):
    """Ids and mask, int32 [B, S]; the padding is [UNK], which the mask has to hide."""
    width = max(map(len, windows))
    ids, mask = np.ones((len(windows), width), np.int32), np.zeros((len(windows), width), np.int32)
    for row, window in enumerate(windows):
        place = slice(len(window)) if side == "right" else slice(width - len(window), width)
        ids[row, place], mask[row, place] = window, 1
    return ids, mask


def states_of(folder, windows):
    """Hidden states, float64 [n, hidden], of each window, by transformers' encoder."""
    encoder = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            encoder(torch.tensor([window])).last_hidden_state[0].double().numpy()
            for window in windows
        ]


def expected_logits(folder, values, kind, documents):
    hidden = [states_of(folder, windows) for windows in documents]
    return formula(values, kind, hidden, documents)


def packed_logits(run, documents):
    """Logits [N, L] of `run`, which takes the tensors of a micro-batch."""
    packed = pack(tf.ragged.constant(documents, tf.int32, ragged_rank=2), PACKING)
    found = np.full((len(documents), NUM_LABELS), np.nan)
    for i in range(packed["input_ids"].shape[0]):
        batch = {name: value[i] for name, value in packed.items()}
        index = batch["document_index"].numpy()
        found[index[index >= 0]] = run(batch)[index >= 0]
    return found


def loaded(folder, **options):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def torch_logits(model, ids, mask):
    with torch.no_grad():
        return model(torch.tensor(ids).long(), torch.tensor(mask).long()).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_both_signatures_and_our_loader_equal_the_formula(kind, folders, texts, monkeypatch):
    """`packed` and our loader on documents of several windows too."""
    folder, values = folders[kind]
    set_rank(monkeypatch, kind)
    ours = load_model_folder(folder)
    documents, _ = ours.encode([*texts[0], *texts[1]])
    assert [len(windows) for windows in documents[-2:]] == [3, 3]
    one = [windows for windows in documents if len(windows) == 1]
    assert len(one) >= 4
    expected = expected_logits(folder, values, kind, documents)
    saved = tf.saved_model.load(os.path.join(folder, "saved_model"))

    def run_ours(batch):
        return ours.model(
            batch, row_groups=PACKING.row_groups, num_documents=PACKING.max_documents
        ).numpy()

    def run_packed(batch):
        names = ("input_ids", "position_ids", "segment_ids", "window_starts", "window_document")
        return saved.signatures["packed"](**{name: batch[name] for name in names})["logits"].numpy()

    np.testing.assert_allclose(packed_logits(run_ours, documents), expected, atol=1e-4)
    np.testing.assert_allclose(packed_logits(run_packed, documents), expected, atol=1e-4)
    serve = saved.signatures["serving_default"]
    for count in (len(one), 1):  # Two shapes of one signature.
        ids, mask = (tf.constant(value) for value in pad([w for (w,) in one[:count]]))
        answer = serve(input_ids=ids, attention_mask=mask, token_type_ids=tf.zeros_like(ids))
        rows = [row for row, windows in enumerate(documents) if len(windows) == 1][:count]
        np.testing.assert_allclose(answer["logits"].numpy(), expected[rows], atol=1e-4)
        probabilities = 1 / (1 + np.exp(-expected[rows]))
        np.testing.assert_allclose(answer["probabilities"].numpy(), probabilities, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_formulas_numbers(kind, folders, texts, monkeypatch):
    folder, values = folders[kind]
    set_rank(monkeypatch, kind)
    documents = [windows for windows in load_model_folder(folder).encode(texts[0])[0]]
    documents = [windows for windows in documents if len(windows) == 1]
    expected = expected_logits(folder, values, kind, documents)
    windows = [window for (window,) in documents]
    is_standard = kind == "cls"
    model = loaded(folder) if is_standard else loaded(folder, trust_remote_code=True)
    name = "Bert" if is_standard else "Multihot"
    assert type(model).__name__ == f"{name}ForSequenceClassification"
    np.testing.assert_allclose(torch_logits(model, *pad(windows)), expected, atol=1e-4)
    if not is_standard:  # BERT's own class numbers the positions from the left edge.
        padded = torch_logits(model, *pad(windows, "left"))
        np.testing.assert_allclose(padded, expected, atol=1e-4)
        with torch.no_grad():  # Without a mask.
            alone = model(torch.tensor(windows[:1])).logits.numpy()
        np.testing.assert_allclose(alone, expected[:1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_alone_gives_the_formulas_numbers(kind, folders, texts, tmp_path, monkeypatch):
    """In a process without TensorFlow, PyTorch and our code; padded on either side."""
    folder, values = folders[kind]
    set_rank(monkeypatch, kind)
    onnx.checker.check_model(os.path.join(folder, "onnx", "model.onnx"), full_check=True)
    documents = [[windows[0]] for windows in cut(folder, [*texts[0], *texts[1]])]
    expected = expected_logits(folder, values, kind, documents)
    given, scores = str(tmp_path / "texts.json"), str(tmp_path / "scores.npy")
    (tmp_path / "texts.json").write_text(json.dumps([*texts[0], *texts[1]]))
    script = Path(__file__).parents[1] / "read_onnx.py"
    for side in ([], ["left"]):
        subprocess.run([sys.executable, script, folder, given, scores, *side], check=True)
        np.testing.assert_allclose(np.load(scores), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_gives_what_score_gives(kind, folders, texts, monkeypatch, warnings):
    """A text of several windows is cut at its first."""
    folder, _ = folders[kind]
    set_rank(monkeypatch, kind)
    ours = load_model_folder(folder)
    documents = [[windows[0]] for windows in cut(folder, [*texts[0], *texts[1]])]
    assert len(documents[-1][0]) == 32
    logits = packed_logits(
        lambda batch: ours.model(
            batch, row_groups=PACKING.row_groups, num_documents=PACKING.max_documents
        ).numpy(),
        documents,
    )
    classify = transformers.pipeline(
        "text-classification", model=folder, trust_remote_code=True, top_k=None,
        function_to_apply="sigmoid", truncation=True,
    )  # fmt: skip
    answers = classify([*texts[0], *texts[1]], batch_size=4)
    for found, row in zip(answers, logits, strict=True):
        scores = {item["label"]: item["score"] for item in found}
        expected = 1 / (1 + np.exp(-row))
        np.testing.assert_allclose([scores[n] for n in ours.labels], expected, atol=1e-4)
    assert warnings() == []


def cut(folder, texts):
    """The one window of each text as transformers cuts it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [[ids] for ids in tokenizer(texts, truncation=True)["input_ids"]]


def test_a_model_that_transformers_saves_is_the_same(folders, tmp_path):
    folder, _ = folders["mean-wide"]
    model = loaded(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_multihot.py").exists()
    again = loaded(str(tmp_path / "again"), trust_remote_code=True)
    ids = np.arange(5, 25).reshape(2, 10)
    logits = torch_logits(model, ids, np.ones_like(ids))
    np.testing.assert_array_equal(torch_logits(again, ids, np.ones_like(ids)), logits)


def test_without_leave_to_run_its_code_a_model_is_not_half_loaded(folders, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "")
    for kind in ("cls-wide", "mean", "label_attention"):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModelForSequenceClassification.from_pretrained(folders[kind][0])


def test_an_exported_encoder_starts_another_model(folders):
    """--init_checkpoint=FOLDER takes encoder and pooler, whatever else a folder has."""
    for kind in ("cls-wide", "mean-wide"):
        folder, before = folders[kind]
        values = load_pretrained(folder, sizes_of(kind, before["encoder/embeddings/word"].shape[0]))
        assert set(values) == {
            name for name in before if name.startswith(("encoder/", "head/pooler/"))
        }
        for name, value in values.items():
            np.testing.assert_array_equal(value, before[name])


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a folder without its SavedModel, and a function that changes its tensors."""

    def copy(kind, change):
        folder = str(tmp_path / kind)
        shutil.copytree(folders[kind][0], folder, ignore=shutil.ignore_patterns("saved_model"))
        path = os.path.join(folder, "model.safetensors")
        if change is not None:
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)
        return folder

    return copy


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("multihot.wide.idf"), r"missing: multihot\.wide\.idf\)"),
        (
            lambda t: rename(t, "multihot.wide.kernel", "multihot.wide.terms"),
            r"missing: multihot\.wide\.kernel; unknown: multihot\.wide\.terms\)",
        ),
        (
            lambda t: t.update({"multihot.wide.idf": np.zeros(3, np.float32)}),
            r"other sizes: multihot\.wide\.idf\)",
        ),
        (lambda t: t.pop("classifier.bias"), r"missing: classifier\.bias\)"),
    ],
)
def test_a_damaged_wide_part_is_one_line(change, said, damaged):
    folder = damaged("mean-wide", change)
    with pytest.raises(UserError, match="not the tensors of a mean model with a wide part") as e:
        load_model_folder(folder)
    assert "\n" not in str(e.value) and f"{folder}/model.safetensors" in str(e.value)
    e.match(said)


def test_a_missing_pooler_is_one_line(damaged):
    def drop(tensors):
        del tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"]

    with pytest.raises(UserError, match=r"of a cls model \(missing: bert\.pooler\.dense\.weight"):
        load_model_folder(damaged("cls", drop))


def test_changed_code_is_not_taken(folders, damaged):
    folder = damaged("mean", None)
    path = os.path.join(folder, "modeling_multihot.py")
    fingerprint = load_model_folder(folder).fingerprint
    assert fingerprint == load_model_folder(folders["mean"][0]).fingerprint
    with open(path, "a", encoding="utf-8") as file:
        file.write("print('mine')\n")
    with pytest.raises(UserError, match=r"modeling_multihot\.py: not the code that was exported"):
        load_model_folder(folder)
    os.remove(path)
    with pytest.raises(UserError, match=r"modeling_multihot\.py: missing; export"):
        load_model_folder(folder)


def test_the_code_has_its_digest_and_a_standard_folder_has_no_code(folders):
    for kind, (folder, _) in folders.items():
        with open(os.path.join(folder, "multihot.json"), encoding="utf-8") as file:
            fingerprints = json.load(file)["fingerprints"]
        assert ("modeling" in fingerprints) == (kind != "cls")
        assert os.path.exists(f"{folder}/modeling_multihot.py") == (kind != "cls")


@pytest.mark.parametrize("kind", ["cls", "mean", "label_attention"])
def test_folders_of_earlier_versions_are_read(kind, folders, damaged):
    """They have our own names and layouts behind `multihot.`, and no word of a wide part."""

    def to_earlier(tensors):
        if kind == "cls":
            return
        for name in ("classifier.weight", "classifier.bias", "multihot.query.weight"):
            if name in tensors:
                value = tensors.pop(name)
                ours = name.removeprefix("multihot.").replace("weight", "kernel")
                tensors["multihot.head/" + ours.replace(".", "/")] = np.ascontiguousarray(value.T)
        for name in [name for name in tensors if name.startswith("bert.")]:
            rename(tensors, name, name.removeprefix("bert."))

    folder = damaged(kind, to_earlier)
    path = os.path.join(folder, "multihot.json")
    with open(path, encoding="utf-8") as file:
        description = json.load(file)
    del description["wide"]
    description["fingerprints"].pop("modeling", None)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(description, file)
    found = load_model_folder(folder).model.named_variables()
    expected = load_model_folder(folders[kind][0]).model.named_variables()
    assert set(found) == set(expected)
    for name, variable in expected.items():
        np.testing.assert_array_equal(found[name], variable, err_msg=name)
