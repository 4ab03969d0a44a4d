"""The commands that work on data and models, in the order in which a user meets them.

Each is the module `trainer.<name>` with a `run(config)`; they run alike on a laptop and on what
`multihot submit` creates. `cli.py` adds those that talk to Google Cloud.
"""

from trainer import config

COMMANDS: dict[str, type] = {
    "sample": config.SampleConfig,
    "prepare": config.PrepareConfig,
    "train": config.TrainConfig,
    "evaluate": config.EvaluateConfig,
    "report": config.ReportConfig,
    "export": config.ExportConfig,
    "score": config.ScoreConfig,
}
