"""Products with packed weights, attention to keys and values in blocks, and choice of tokens from logits."""
