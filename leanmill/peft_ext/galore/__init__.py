"""Full fine-tuning whose optimizer works in a subspace of each weight's gradient."""
