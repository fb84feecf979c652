"""Products of activations with packed weights, and choice of tokens from logits."""
