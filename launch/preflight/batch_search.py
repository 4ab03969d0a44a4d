"""The largest micro-batch that fits, from few compilations: memory is nearly linear in tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# Sizes are multiples of it, so that rows come out whole.
QUANTUM = 512
# Guesses before the search settles for what it has.
_MOST_TRIALS = 6


@dataclass(frozen=True)
class Largest:
    """What a search found.

    Attributes:
      tokens: the largest size that was seen to fit; 0 if none was.
      memory: bytes that it needs.
      refused: the smallest size that was seen not to fit, with the bytes that it needs (infinite
        where the compiler did not say), or None.
      trials: sizes that were looked at.
    """

    tokens: int
    memory: float
    refused: tuple[int, float] | None
    trials: int


def find_largest(
    memory_of: Callable[[int], float], limit: float, start: int, fixed: float, least: int
) -> Largest:
    """Looks for the largest number of tokens whose memory is within a limit.

    The next guess is where the line through two measured sizes meets the limit, between what is
    known to fit and what is known not to. It ends when the line meets the limit less than
    `QUANTUM` above a size that fits.

    Args:
      memory_of: bytes that so many tokens need, infinity for more than can be told.
      limit: bytes that there are.
      start: the first guess, whose memory is looked up first.
      fixed: bytes that do not grow with the tokens, about: for the second guess.
      least: the smallest size to look at.
    """
    known: dict[int, float] = {}
    guess = max(least, start)
    while guess not in known and len(known) < _MOST_TRIALS:
        known[guess] = memory_of(guess)
        guess = _next_guess(known, limit, fixed, least)
    fits = [tokens for tokens, memory in known.items() if memory <= limit]
    refused = [tokens for tokens, memory in known.items() if memory > limit]
    best = max(fits, default=0)
    above = (min(refused), known[min(refused)]) if refused else None
    return Largest(best, known.get(best, 0.0), above, len(known))


def _next_guess(known: dict[int, float], limit: float, fixed: float, least: int) -> int:
    """The next size to look at; one that is known already ends the search."""
    low = max((tokens for tokens, memory in known.items() if memory <= limit), default=0)
    high = min((tokens for tokens, memory in known.items() if memory > limit), default=None)
    finite = {tokens: memory for tokens, memory in known.items() if math.isfinite(memory)}
    if high is not None and known[high] == math.inf and len(finite) < 2:
        guess = (low + high) / 2
    elif len(finite) == 1:
        ((tokens, memory),) = finite.items()
        guess = tokens * (limit - fixed) / max(memory - fixed, 1.0)
    else:
        # The two nearest to the limit.
        (a, of_a), (b, of_b) = sorted(finite.items(), key=lambda pair: abs(pair[1] - limit))[:2]
        slope = (of_b - of_a) / (b - a)
        guess = a + (limit - of_a) / slope if slope > 0 else a
    rounded = int(guess) // QUANTUM * QUANTUM
    if high is not None:
        rounded = min(rounded, (high - 1) // QUANTUM * QUANTUM)
    return max(rounded, low, least)
