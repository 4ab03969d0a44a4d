"""All predictions of a split at once."""

from trainer.data.metadata import Metadata
from trainer.evaluation.measurement import Predictions, concatenate
from trainer.model.predictor import Predictor


def predict_split(
    predictor: Predictor, data_dir: str, metadata: Metadata, split_name: str
) -> Predictions:
    return concatenate(list(predictor.predict_blocks(data_dir, metadata, split_name)))
