"""A short name for the weights that are served, so that answers can say which ones they come from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_NUM_SAMPLES = 1024


def weight_hash(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of the names, dtypes, shapes and samples of all parameters and persistent buffers.

    The samples are up to 1024 elements of each, evenly apart: reading all would take longer than loading. Another
    checkpoint, recipe or dtype gives another hash, and so does training; a change of single weights may not. It is
    no proof that files are whole.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_samples(tensor).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    """Elements of a tensor in any layout, without a copy of it."""
    num_samples = min(tensor.numel(), _NUM_SAMPLES)
    positions = torch.arange(num_samples, device=tensor.device) * tensor.numel() // max(1, num_samples)
    return tensor.reshape(1) if tensor.dim() == 0 else tensor[torch.unravel_index(positions, tensor.shape)]
