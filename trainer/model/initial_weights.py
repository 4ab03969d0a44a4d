"""The seeds of a model's initial weights.

Keras draws them from Python's global generator, from which any thread may draw in between: Google's
clients do, for the pauses between their requests. Here they come from one generator a model.
"""

import contextlib
import contextvars
import random
from collections.abc import Iterator

import keras

_GENERATOR: contextvars.ContextVar[random.Random | None] = contextvars.ContextVar(
    "generator", default=None
)
_MOST = 10**9  # As Keras has it: so these are the seeds that it draws when nobody disturbs it.


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Within the block, `truncated_normal` gives the same initial weights for the same seed."""
    token = _GENERATOR.set(random.Random(seed))
    try:
        yield
    finally:
        _GENERATOR.reset(token)


def truncated_normal(spread: float) -> keras.initializers.Initializer:
    """Normal weights of standard deviation `spread`, those beyond two of it drawn again."""
    generator = _GENERATOR.get()
    seed = None if generator is None else generator.randint(1, _MOST)
    return keras.initializers.TruncatedNormal(stddev=spread, seed=seed)
