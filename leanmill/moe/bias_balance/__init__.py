"""Load balance by biases on the choice of experts, without a loss."""
