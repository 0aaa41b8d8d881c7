"""Merging LoRA adapters rank by rank."""
