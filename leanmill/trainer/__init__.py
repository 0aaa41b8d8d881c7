"""The run: preparation, train module, losses, loop, evaluation."""
