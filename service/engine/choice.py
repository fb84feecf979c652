"""Peaks of rows of logits and tokens drawn from them: natively where the kernels do it, else by torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine import candidates
from service.engine.sequence import SamplingParams
from service.kernels import dispatch, native_sampling
from service.kernels.native_sampling import Draw, Peaks


def find_peaks(logits: Tensor) -> Peaks:
    """The largest of each row of contiguous logits float32[rows, vocab], NaN if there is any, and its first token."""
    library = dispatch.sampling_library(logits)
    if library is not None:
        return native_sampling.find_peaks(library, logits)
    maxima = candidates.block_maxima(logits)
    return Peaks(maxima.amax(1).tolist(), candidates.likeliest(logits, maxima).tolist())


def draw(logits: Tensor, rows: Seq[int], params: Seq[SamplingParams], uniforms: Seq[float]) -> list[int]:
    """Draw a token from each of some rows of contiguous logits float32[rows, vocab], whose peaks are finite.

    Args:
        params: of each of `rows`; temperatures are above 0.
        uniforms: of each of `rows`, in [0, 1), at which the cumulative distributions are inverted.
    """
    library = dispatch.sampling_library(logits)
    if library is not None:
        draws = [
            Draw(row, own.top_k, 1 / max(own.temperature, candidates.TINY), own.top_p, own.min_p, uniform)
            for row, own, uniform in zip(rows, params, uniforms, strict=True)
        ]
        return native_sampling.draw(library, logits, draws)
    if list(rows) != list(range(len(logits))):
        logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
    shares = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    return candidates.draw(logits, params, shares).tolist()
