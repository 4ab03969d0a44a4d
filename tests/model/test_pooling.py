"""What a checkpoint says of its own pooling, wherever the checkpoint comes from."""

import json

import pytest

from trainer.errors import UserError
from trainer.model.pretrained import read_pooling, resolve_checkpoint
from trainer.run_config import TrainConfig
from trainer.training.setup import choose_head


def write_pooling(folder, text):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean", "embedding_dimension": 384}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode": "lasttoken"}, None),
        ({}, None),
    ],
)
def test_the_head_is_the_checkpoints_own_pooling_or_the_mean(tmp_path, settings, expected):
    folder = write_pooling(tmp_path, json.dumps(settings))
    assert read_pooling(folder) == expected
    config = TrainConfig(data_dir="d", model_dir="m", init_checkpoint=folder)
    assert choose_head(config, folder) == (expected or "mean")
    asked = TrainConfig(data_dir="d", model_dir="m", init_checkpoint=folder, head="label_attention")
    assert choose_head(asked, folder) == "label_attention"


def test_without_a_pooling_configuration_it_is_the_mean(tmp_path):
    config = TrainConfig(data_dir="d", model_dir="m")
    assert read_pooling(str(tmp_path)) is None
    assert choose_head(config, str(tmp_path)) == choose_head(config, None) == "mean"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"mean"', "\x00"])
def test_a_damaged_one_is_one_line(tmp_path, text):
    folder = write_pooling(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_pooling(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/1_Pooling/config.json: ") and "\n" not in message
    assert message.endswith("download it again")


def test_a_hub_checkpoint_is_downloaded_with_it(monkeypatch):
    """And without the weights in other formats, which lie in other folders."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **patterns: asked.update(patterns)
    )
    resolve_checkpoint("sentence-transformers/all-MiniLM-L6-v2")
    wanted = ["config.json", "vocab.txt", "model.safetensors", "1_Pooling/config.json"]
    others = [
        "pytorch_model.bin", "onnx/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
        "1_Dense/config.json", "openvino/a.json", "10_x/a.json",
    ]  # fmt: skip
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted
