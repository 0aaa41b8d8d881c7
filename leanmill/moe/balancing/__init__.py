"""Keeping experts equally loaded: losses of routers and biases of choices, whoever the routers belong to."""
