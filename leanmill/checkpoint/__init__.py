"""Checkpoints: safetensors and JSON, complete or not there at all. Importing this imports no torch."""
