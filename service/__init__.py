"""Pennyweight serves Hugging Face causal language models, quantized while they load."""

__version__ = "0.1.0"
