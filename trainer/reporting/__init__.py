"""The page that `multihot report` writes."""
