"""Bytes: local files and objects in Cloud Storage, there whole or not at all."""
