"""Multihot: multi-label BERT training and scoring on TPU and multi-GPU clusters."""

__version__ = "0.1.0"
