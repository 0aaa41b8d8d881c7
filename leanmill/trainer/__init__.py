"""The run: recipe, data, models, optimizers, loop, checkpoints, evaluation, export, report."""
