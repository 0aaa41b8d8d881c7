"""One-shot quantisation with corrected columns."""
