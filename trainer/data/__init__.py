"""Shards, tokens and micro-batches: what training and scoring read."""
