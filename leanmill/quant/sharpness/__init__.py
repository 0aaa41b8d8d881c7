"""How steep the loss is around a model's logits."""
