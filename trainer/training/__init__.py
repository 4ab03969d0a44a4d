"""One step with its loss and optimizer, checkpoints, and the record of a run."""
