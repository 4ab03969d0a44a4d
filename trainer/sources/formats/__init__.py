"""The formats of raw rows, one family a file."""
