"""Text to token rows: corpora, tokenizers, packing, mixtures and exactly resumable positions."""
