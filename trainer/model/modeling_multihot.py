"""A Multihot model for PyTorch: BERT, its head, and the linear model over WordPieces beside it.

transformers runs this file, which needs nothing else, when a model folder has it:

    AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)

The sigmoids of the logits are calibrated probabilities. A text is one window, however long the
documents were that the model has learned from.
"""

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MultihotConfig(BertConfig):
    """BERT's sizes, and what stands behind the encoder.

    `head` is cls, mean or label_attention, `window_pooling` max, mean or attention, `wide` none or
    wordpieces, `wide_pairs` the buckets that pairs of tokens are hashed to (a power of two, or 0),
    and `wide_rank` the columns between the wide part's two tables, 0 for one table.
    """

    model_type = "multihot"

    head: str = "mean"
    window_pooling: str = "max"
    wide: str = "none"
    wide_pairs: int = 0
    wide_rank: int = 0


class Wide(nn.Module):
    """A document's sublinear TF-IDF, of norm 1, through one table or two.

    Terms are the tokens, then the buckets of pairs of neighbours; `idf` is 0 for [CLS].
    """

    def __init__(self, config: MultihotConfig) -> None:
        super().__init__()
        self.vocab_size, self.pairs = config.vocab_size, config.wide_pairs
        size, rank, labels = self.vocab_size + self.pairs, config.wide_rank, config.num_labels
        self.idf = nn.Parameter(torch.ones(size), requires_grad=False)
        self.terms = nn.Parameter(torch.zeros(size, rank)) if rank else None
        self.kernel = nn.Parameter(torch.zeros(rank or size, labels))

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask, int64 [B, S], to logits without bias [B, L]."""
        terms, present = input_ids, mask.float()
        if self.pairs:
            pairs = self.vocab_size + self._hash_pairs(input_ids[:, :-1], input_ids[:, 1:])
            terms = torch.cat([terms, pairs], dim=1)
            present = torch.cat([present, present[:, 1:] * present[:, :-1]], dim=1)
        counts = present.new_zeros(len(terms), len(self.idf)).scatter_add(1, terms, present)
        counts = counts.gather(1, terms).clamp(min=1)
        weights = (1 + counts.log()) * self.idf.float()[terms]
        # Each of a term's tokens has an equal share of the term's weight, and of its square.
        share = present / counts
        squares = (share * weights**2).sum(dim=1, keepdim=True)
        weights = share * weights * squares.clamp(min=1e-30).rsqrt()
        table = self.kernel if self.terms is None else self.terms
        summed = embedding_bag(terms, table, mode="sum", per_sample_weights=weights.to(table.dtype))
        return summed if self.terms is None else summed @ self.kernel

    def _hash_pairs(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The bucket of each pair of ids: a hash of 32 bits."""
        mixed = left * 0x9E3779B1 + right * 0x85EBCA77 & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
        return (mixed ^ (mixed >> 13)) & (self.pairs - 1)


class OwnParts(nn.Module):
    """What BertForSequenceClassification does not have."""

    def __init__(self, config: MultihotConfig) -> None:
        super().__init__()
        size, is_attending = config.hidden_size, config.head == "label_attention"
        self.query = nn.Linear(size, config.num_labels, bias=False) if is_attending else None
        # For documents of several windows: kept, but not used here.
        has_window_query = config.window_pooling == "attention" and not is_attending
        self.window_query = nn.Parameter(torch.zeros(size, 1)) if has_window_query else None
        self.wide = None if config.wide == "none" else Wide(config)


class MultihotForSequenceClassification(BertPreTrainedModel):
    """Token ids to one logit for each label, for inference."""

    config_class = MultihotConfig

    def __init__(self, config: MultihotConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=config.head == "cls")
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.multihot = OwnParts(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Ids, mask and token types, int64 [B, S], to logits [B, L]; padding is on either side."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        hidden = self.bert(
            input_ids,
            attention_mask=mask,
            token_type_ids=token_type_ids,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        ).last_hidden_state
        logits = self._apply_head(hidden, mask)
        if self.multihot.wide is not None:
            logits = logits + self.multihot.wide(input_ids, mask)
        return SequenceClassifierOutput(logits=logits)

    def _apply_head(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, S, hidden] to [B, L]."""
        if self.config.head == "cls":
            first = hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(dim=1)]
            return self.classifier(self.bert.pooler(first[:, None]))
        present = mask[:, :, None].to(hidden.dtype)
        if self.config.head == "mean":
            mean = (hidden * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
            return self.classifier(mean)
        assert self.multihot.query is not None
        scores = self.multihot.query(hidden).float()
        scores = scores.masked_fill(mask[:, :, None] == 0, torch.finfo(scores.dtype).min)
        attention = scores.softmax(dim=1).to(hidden.dtype)
        values = hidden @ self.classifier.weight.T
        return (attention * values).sum(dim=1) + self.classifier.bias
