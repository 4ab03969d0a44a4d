"""Lowers and compiles a step for a TPU that is not there, and estimates its time."""
