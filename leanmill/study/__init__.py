"""What a trained model does, beyond its loss: studies of a run's checkpoints, written beside it."""
