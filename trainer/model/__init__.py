"""The encoder, its heads, pretrained weights, prediction, and the model folder."""
