"""Schemes, rounding, packing: pure functions, tensors in and tensors out."""
