"""Observers that write a run down: progress, JSONL, TensorBoard, Weights & Biases, site statistics, report."""
