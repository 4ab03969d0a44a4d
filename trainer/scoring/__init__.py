"""The plan, pipeline, parts and result files of `multihot score`."""
