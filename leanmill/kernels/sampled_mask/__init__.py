"""A weight times a mask drawn softly from the logits of every way to keep N of M, in one pass each way."""
