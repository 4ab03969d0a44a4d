"""The ONNX graph: every activation against transformers, and what it refuses."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from trainer.errors import UserError
from trainer.model import onnx_graph
from trainer.model.model import build_model
from trainer.model.onnx_graph import make_onnx
from trainer.model.pretrained import load_pretrained, model_config
from trainer.model_config import ModelConfig


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_it_equals_bert_for_sequence_classification(activation, tmp_path):
    sizes = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=20, hidden_act=activation,
        initializer_range=0.4, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(1)
    reference = transformers.BertForSequenceClassification(sizes).eval()
    reference.save_pretrained(tmp_path)
    config = model_config(str(tmp_path), 4, "cls", 0.0, 0.0)
    values = load_pretrained(str(tmp_path), config) | {
        "head/classifier/kernel": reference.classifier.weight.detach().numpy().T,
        "head/classifier/bias": reference.classifier.bias.detach().numpy(),
    }
    graph = make_onnx(config, values)
    onnx.checker.check_model(graph, full_check=True)
    assert [item.version for item in graph.opset_import] == [18] and graph.ir_version == 8
    assert {node.domain for node in graph.graph.node} == {""}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    rng = np.random.default_rng(2)
    for rows, length in ((5, 17), (1, 1)):
        ids, types = rng.integers(0, 50, (rows, length)), rng.integers(0, 2, (rows, length))
        mask = (np.arange(length) < rng.integers(1, length + 1, (rows, 1))).astype(np.int64)
        (found,) = session.run(
            ["logits"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        )
        with torch.no_grad():
            expected = reference(*map(torch.tensor, (ids, mask, types))).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_weights_that_one_file_cannot_hold_are_refused(monkeypatch):
    config = ModelConfig(10, 2, hidden_size=8, num_layers=1, num_attention_heads=2)
    variables = build_model(config).named_variables()
    monkeypatch.setattr(onnx_graph, "_MAX_BYTES", 1000)
    with pytest.raises(UserError, match="one ONNX file holds less than 2; leave onnx out"):
        make_onnx(config, {name: variable.numpy() for name, variable in variables.items()})
