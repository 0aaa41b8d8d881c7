"""Cross-entropy straight from hidden states, without the whole [tokens, vocabulary] logits."""
