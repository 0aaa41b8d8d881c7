"""NEFTune: noise on the embeddings of tokens while a model is tuned."""
