"""Every update rule against float64 NumPy over several steps, and AdamW against PyTorch's."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from trainer.model_config import OptimizerConfig
from trainer.training.optimizer import AdamW

NAMES = [
    "encoder/embeddings/word",
    "encoder/embeddings/layer_norm/gamma",
    "encoder/layer_0/attention/qkv/kernel",
    "encoder/layer_0/attention/qkv/bias",
    "encoder/layer_1/intermediate/kernel",
    "head/pooler/kernel",
    "head/classifier/kernel",
    "head/classifier/bias",
]
SHAPES = [(11, 3), (3,), (3, 9), (9,), (3, 5), (3, 3), (3, 2), (2,)]
LAYERS = 2
TOTAL = 100
STEP = 9


def make_problem(seed=0, steps=12):
    """Initial weights, and for every step gradients of widely different sizes."""
    random = np.random.default_rng(seed)
    weights = [random.normal(0, 1, shape).astype(np.float32) for shape in SHAPES]
    gradients = [
        [(random.normal(0, 10.0 ** random.integers(-4, 1), s)).astype(np.float32) for s in SHAPES]
        for _ in range(steps)
    ]
    return weights, gradients


def make_optimizer(config, weights):
    variables = [tf.Variable(weight) for weight in weights]
    return AdamW(config, dict(zip(NAMES, variables, strict=True)), LAYERS, TOTAL)


def run(optimizer, gradients, jit_compile=False):
    @tf.function(jit_compile=jit_compile)
    def step(values, documents):
        return optimizer.apply(values, documents)

    return [
        step([tf.constant(g) for g in values], tf.constant(i * STEP, tf.int64))
        for i, values in enumerate(gradients)
    ]


def reference_rate(config, documents):
    warmup = config.warmup * TOTAL
    if documents < warmup:
        return config.learning_rate * documents / warmup
    left = min(max((TOTAL - documents) / (TOTAL - warmup), 0), 1)
    factor = {"linear": left, "cosine": (1 + np.cos(np.pi * (1 - left))) / 2, "constant": 1}
    return config.learning_rate * factor[config.schedule]


def reference_factor(config, name):
    if name.startswith("head/classifier"):
        return config.head_lr_multiplier or 1.0
    height = {"embeddings": 3, "layer_0": 2, "layer_1": 1, "pooler": 0}
    decay = config.layerwise_lr_decay or 1.0
    return decay ** next(h for k, h in height.items() if f"/{k}/" in name)


def reference_run(config, weights, gradients):
    """The formulas of AdamW's docstring in float64; returns weights, m, v, averages."""
    w = [np.asarray(x, np.float64) for x in weights]
    m, v = [x * 0 for x in w], [x * 0 for x in w]
    average = [x.copy() for x in w]
    t = 0
    for i, step in enumerate(gradients):
        g = [np.asarray(x, np.float64) for x in step]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        if not np.isfinite(norm):
            continue
        t += 1
        if config.clip_norm and norm > config.clip_norm:
            g = [x * config.clip_norm / norm for x in g]
        for k, name in enumerate(NAMES):
            rate = reference_rate(config, i * STEP) * reference_factor(config, name)
            b1, b2 = config.adam_beta1, config.adam_beta2
            m[k] = b1 * m[k] + (1 - b1) * g[k]
            v[k] = b2 * v[k] + (1 - b2) * g[k] ** 2
            if not (name.endswith("bias") or "layer_norm" in name):
                w[k] = w[k] * (1 - rate * config.weight_decay)
            root = np.sqrt(v[k] / (1 - b2**t))
            w[k] = w[k] - rate * (m[k] / (1 - b1**t)) / (root + config.adam_epsilon)
            decay = min(config.ema_decay, t / (9 + t))
            average[k] = decay * average[k] + (1 - decay) * w[k]
    return w, m, v, average


def assert_close(variables, expected, scale=1.0):
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=3e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(clip_norm=0.0, weight_decay=0.0, warmup=0.0, schedule="constant"),
        dict(clip_norm=0.0, weight_decay=0.3, warmup=0.25, schedule="linear"),
        dict(clip_norm=1.0, weight_decay=0.1, schedule="cosine"),
        dict(layerwise_lr_decay=0.6, head_lr_multiplier=4.0, schedule="linear", adam_epsilon=1e-3),
        dict(ema_decay=0.5, adam_beta1=0.0, adam_beta2=0.9, schedule="constant"),
    ],
)
def test_every_rule_equals_the_float64_formula(options, jit_compile):
    config = OptimizerConfig(learning_rate=0.02, **options)
    weights, gradients = make_problem()
    optimizer = make_optimizer(config, weights)
    results = run(optimizer, gradients, jit_compile)
    w, m, v, average = reference_run(config, weights, gradients)
    assert_close(optimizer.variables, w)
    assert_close(optimizer.m, m)
    assert_close(optimizer.v, v)
    if config.ema_decay:
        assert_close(optimizer.ema, average)
    else:
        assert optimizer.ema == []
    norms = [np.sqrt(sum((np.float64(g) ** 2).sum() for g in step)) for step in gradients]
    np.testing.assert_allclose([r["grad_norm"] for r in results], norms, rtol=1e-5)
    rates = [reference_rate(config, i * STEP) for i in range(len(gradients))]
    np.testing.assert_allclose([r["learning_rate"] for r in results], rates, rtol=1e-5, atol=1e-9)
    assert (int(optimizer.iterations), int(optimizer.skipped)) == (len(gradients), 0)


TORCH_RUN = """
import sys
import numpy as np, torch
folder, steps, undecayed = sys.argv[1], int(sys.argv[2]), {int(k) for k in sys.argv[3:]}
problem = np.load(folder + "/problem.npz")
count = sum(name.startswith("weight") for name in problem)
weights = [torch.nn.Parameter(torch.tensor(problem[f"weight_{k}"])) for k in range(count)]
groups = [{"params": [w], "weight_decay": 0.0 if k in undecayed else 0.1}
          for k, w in enumerate(weights)]
optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
for i in range(steps):
    for k, w in enumerate(weights):
        w.grad = torch.tensor(problem[f"gradient_{i}_{k}"])
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
np.savez(folder + "/result.npz", *[w.detach().numpy() for w in weights])
"""


def test_equals_torch_adamw_with_clipping(tmp_path):
    config = OptimizerConfig(
        learning_rate=0.01, warmup=0.0, schedule="constant", weight_decay=0.1, clip_norm=1.0
    )
    weights, gradients = make_problem(seed=4)
    optimizer = make_optimizer(config, weights)
    run(optimizer, gradients)

    arrays = {f"weight_{k}": weight for k, weight in enumerate(weights)}
    for i, step in enumerate(gradients):
        arrays.update((f"gradient_{i}_{k}", gradient) for k, gradient in enumerate(step))
    np.savez(tmp_path / "problem.npz", **arrays)
    undecayed = [k for k, name in enumerate(NAMES) if name.endswith("bias") or "norm" in name]
    # In a process of its own: torch.optim loads Triton, whose LLVM and TensorFlow's abort together.
    arguments = [str(tmp_path), str(len(gradients)), *map(str, undecayed)]
    subprocess.run([sys.executable, "-c", TORCH_RUN, *arguments], check=True)
    with np.load(tmp_path / "result.npz") as result:
        assert_close(optimizer.variables, [result[f"arr_{k}"] for k in range(len(NAMES))])


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_non_finite_step_changes_nothing_but_the_counter(bad, jit_compile):
    config = OptimizerConfig(learning_rate=0.02, warmup=0.0, weight_decay=0.1, ema_decay=0.9)
    weights, gradients = make_problem(steps=5)
    damaged = [[g.copy() for g in step] for step in gradients]
    damaged[2][4][1, 1] = bad
    optimizer = make_optimizer(config, weights)
    run(optimizer, damaged[:2], jit_compile)
    before = {name: variable.numpy() for name, variable in optimizer.state().items()}
    before.update((f"w{i}", w.numpy()) for i, w in enumerate(optimizer.variables))
    result = optimizer.apply([tf.constant(g) for g in damaged[2]], tf.constant(18, tf.int64))
    after = {name: variable.numpy() for name, variable in optimizer.state().items()}
    after.update((f"w{i}", w.numpy()) for i, w in enumerate(optimizer.variables))
    assert int(result["skipped"]) == 1 and before.pop("skipped") == 0 and after.pop("skipped") == 1
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_the_run_around_a_skipped_step_follows_the_formula():
    config = OptimizerConfig(learning_rate=0.02, ema_decay=0.9)
    weights, gradients = make_problem()
    gradients[3][0][2, 1] = np.nan
    gradients[7][7][0] = np.inf
    optimizer = make_optimizer(config, weights)
    results = run(optimizer, gradients, jit_compile=True)
    w, m, v, average = reference_run(config, weights, gradients)
    assert [int(r["skipped"]) for r in results] == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert (int(optimizer.iterations), int(optimizer.skipped)) == (10, 2)
    for variables, expected in ((optimizer.variables, w), (optimizer.m, m), (optimizer.v, v)):
        assert_close(variables, expected)
    assert_close(optimizer.ema, average)


def test_sparse_gradients_equal_dense_ones():
    config = OptimizerConfig(learning_rate=0.02, warmup=0.0)
    weights, gradients = make_problem(steps=1)
    rows = np.array([4, 1, 4])
    values = gradients[0][0][:3]
    dense = np.zeros(SHAPES[0], np.float32)
    np.add.at(dense, rows, values)
    results = []
    for first in (tf.constant(dense), tf.IndexedSlices(values, rows, tf.constant(SHAPES[0]))):
        optimizer = make_optimizer(config, weights)
        rest = [tf.constant(g) for g in gradients[0][1:]]
        norm = optimizer.apply([first, *rest], tf.constant(0, tf.int64))["grad_norm"]
        results.append([norm.numpy()] + [w.numpy() for w in optimizer.variables])
    for sparse, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(sparse, expected)


def test_a_weight_without_gradient_stays():
    config = OptimizerConfig(learning_rate=0.02, warmup=0.0)
    weights, gradients = make_problem(steps=1)
    optimizer = make_optimizer(config, weights)
    values = [
        None if name == "head/pooler/kernel" else g
        for name, g in zip(NAMES, gradients[0], strict=True)
    ]
    optimizer.apply(values, tf.constant(0, tf.int64))
    changed = [np.any(v.numpy() != w) for v, w in zip(optimizer.variables, weights, strict=True)]
    assert changed == [name != "head/pooler/kernel" for name in NAMES]


def test_schedule_starts_at_zero_peaks_after_warmup_and_ends_at_zero():
    for schedule, last in (("linear", 0.0), ("cosine", 0.0), ("constant", 2.0)):
        config = OptimizerConfig(learning_rate=2.0, warmup=0.1, schedule=schedule)
        optimizer = make_optimizer(config, make_problem()[0])
        rates = [float(optimizer.learning_rate(d)) for d in (0, 5, 10, 100, 120)]
        np.testing.assert_allclose(rates, [0, 1, 2, last, last], atol=1e-6)


def test_rates_and_decays_by_name():
    config = OptimizerConfig(
        learning_rate=0.02, layerwise_lr_decay=0.5, head_lr_multiplier=3.0, weight_decay=0.01
    )
    optimizer = make_optimizer(config, make_problem()[0])
    assert optimizer.rate_factors == [0.125, 0.125, 0.25, 0.25, 0.5, 1.0, 3.0, 3.0]
    assert optimizer.decays == [0.01, 0, 0.01, 0, 0.01, 0.01, 0.01, 0]


def test_restored_state_continues_bit_for_bit():
    config = OptimizerConfig(learning_rate=0.02, ema_decay=0.9)
    weights, gradients = make_problem()
    whole = make_optimizer(config, weights)
    run(whole, gradients)
    first = make_optimizer(config, weights)
    run(first, gradients[:5])
    second = make_optimizer(config, [w.numpy() for w in first.variables])
    for name, variable in second.state().items():
        variable.assign(first.state()[name])

    @tf.function
    def step(values, documents):
        return second.apply(values, documents)

    for i, values in enumerate(gradients[5:], 5):
        step([tf.constant(g) for g in values], tf.constant(i * STEP, tf.int64))
    for a, b in zip(whole.variables + whole.ema, second.variables + second.ema, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert set(second.state()) == {"iterations", "skipped"} | {
        f"{kind}/{name}" for kind in ("m", "v", "ema") for name in NAMES
    }


def test_without_average_the_state_has_none():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), make_problem()[0])
    assert set(optimizer.state()) == {"iterations", "skipped"} | {
        f"{kind}/{name}" for kind in ("m", "v") for name in NAMES
    }


@pytest.mark.parametrize(
    ("size", "is_pretrained", "expected"),
    [(768, True, (1e-4, 0.9, 30.0)), (384, True, (2e-4, 0.9, 30.0)), (256, False, (5e-4, 1, 1))],
)
def test_rates_that_nobody_chose_follow_from_the_models_kind_and_width(
    size, is_pretrained, expected
):
    found = OptimizerConfig().resolve(size, is_pretrained)
    rates = found.learning_rate, found.layerwise_lr_decay, found.head_lr_multiplier
    assert rates == pytest.approx(expected)
    chosen = OptimizerConfig(learning_rate=0.3, layerwise_lr_decay=0.7, head_lr_multiplier=2.0)
    assert chosen.resolve(size, is_pretrained) == chosen
