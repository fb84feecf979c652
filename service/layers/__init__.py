"""Modules that hold packed weights in place of `nn.Linear` and `nn.Embedding`."""
