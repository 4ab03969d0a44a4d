"""The two passes of `multihot prepare`."""
