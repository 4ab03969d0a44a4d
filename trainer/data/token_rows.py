"""Rows that come tokenised: whether a model, or a data folder, can take their ids."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLimits:
    """What token ids have to keep to.

    Attributes:
      cls_id, sep_id: ids of [CLS] and [SEP].
      vocab_size: one more than the largest id.
      max_seq_length: longest window in tokens, [CLS] and [SEP] included.
      max_windows: the most windows of a document.
    """

    cls_id: int
    sep_id: int
    vocab_size: int
    max_seq_length: int
    max_windows: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_seq_length: int, max_windows: int) -> "TokenLimits":
        """The limits that a tokenizer and the shape of documents set."""
        return cls(
            tokenizer.cls_id, tokenizer.sep_id, tokenizer.vocab_size, max_seq_length, max_windows
        )


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
