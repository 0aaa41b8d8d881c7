"""WeLore: weights of low rank as pairs of factors, and fine-tuning of the pairs alone."""
