"""`prepare` and `score` as Apache Beam pipelines."""
