"""Products of activations with packed weights."""
