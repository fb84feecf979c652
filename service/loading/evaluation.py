"""A full-precision model and quantized ones on a text of any length, one window of it after another.

Both sides are computed as `fidelity` does: the stock model in float32, weights read or decoded while they are
multiplied. So figures are about the format of the weights, whatever the serving dtype and kernels. What the body of the
full-precision model gives is kept in a file, so that it is run once, however many models are compared with it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from service.errors import SettingError
from service.loading.config import ServedModel, first_line
from service.loading.deferred import Workshop
from service.loading.fidelity import Side
from service.loading.loader import settle_vocabulary
from service.loading.originals import as_held, read_originals
from service.loading.planning import open_checkpoint
from service.loading.progress import LoadProgress
from service.loading.source import ModelSource
from service.numerics.divergence import Divergence

BATCH_TOKENS = 2048
"""Of one forward, if a window is not longer: fewer would have weights decoded more often, more take more memory."""
_LOGITS = 1 << 20
"""Of one piece of the vocabulary, all tokens together."""
_LARGEST_LOSS = 700.0
"""Nats; the exponential of more is no float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """One model on a text, beside the full-precision one.

    Attributes:
        perplexity: exponential of the mean loss of the tokens of the text.
        kl_mean_nats, kl_p99_nats: KL(original || quantized) of a token, the mean and what 99 % do not exceed.
        top1_ratio: share of the tokens for which both find the same token likeliest.
        num_tokens: that these are about.
    """

    perplexity: float
    kl_mean_nats: float
    kl_p99_nats: float
    top1_ratio: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Windows:
    """A text as a model reads it.

    Attributes:
        batches: token ids int64[windows, tokens], each window read by itself.
        num_unscored: tokens at the beginning of each window that nothing is said about, at least one.
    """

    batches: tuple[Tensor, ...]
    num_unscored: int


class Evaluator:
    """The full-precision model of a checkpoint, with which others are compared; a context that closes its files.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel: the checkpoint cannot be read.
    """

    def __init__(self, source: ModelSource, served: ServedModel, windows: Windows, device: torch.device) -> None:
        self._windows = windows
        self._workshop = Workshop(device)
        self._checkpoint = open_checkpoint(source, served, LoadProgress())
        try:
            settle_vocabulary(served, self._checkpoint.refs)
            self._original = Side(read_originals(served, self._checkpoint.refs, self._workshop))
        except BaseException:
            self._checkpoint.close()
            raise
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._checkpoint.close()
        self._folder.cleanup()

    @property
    def num_batches(self) -> int:
        """Forwards for each model."""
        return len(self._windows.batches)

    @torch.no_grad()
    def original(self, on_batch: Callable[[], None]) -> TextQuality:
        """The full-precision model by itself; to be called first.

        Raises:
            SettingError: what its body gives cannot be written.
        """
        scores = _Scores(self._windows.num_unscored)
        for number, batch in enumerate(self._batches()):
            self._original.read(batch, _ignore)
            self._keep(number)
            scores.add(batch, self._original, None)
            on_batch()
        return scores.quality()

    @torch.no_grad()
    def compare(self, held: nn.Module, on_batch: Callable[[], None]) -> TextQuality:
        """A quantized model beside the full-precision one."""
        side = Side(as_held(self._original.model, held, self._workshop))
        scores = _Scores(self._windows.num_unscored)
        for number, batch in enumerate(self._batches()):
            # The file is of this process: no one else could write it.
            self._original.given = torch.load(self._kept(number), weights_only=False)
            side.read(batch, _ignore)
            scores.add(batch, self._original, side)
            on_batch()
        return scores.quality()

    def _batches(self) -> list[Tensor]:
        return [batch.to(self._workshop.device) for batch in self._windows.batches]

    def _keep(self, number: int) -> None:
        try:
            torch.save(self._original.given, self._kept(number))
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer
            raise SettingError(
                f"{self._folder.name}: what the model gives cannot be kept there ({first_line(error)}); set TMPDIR to "
                "a folder with more room, or give a shorter text"
            ) from error

    def _kept(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.pt"


class _Scores:
    """Figures of the tokens so far."""

    def __init__(self, num_unscored: int) -> None:
        self._num_unscored = num_unscored
        self._kl: list[Tensor] = []
        self._agrees: list[Tensor] = []
        self._losses: list[Tensor] = []

    def add(self, batch: Tensor, original: Side, other: Side | None) -> None:
        """Take windows that both have read; None: the original is compared with itself."""
        targets = batch.roll(-1, 1).flatten()
        is_scored = torch.ones_like(batch, dtype=torch.bool)
        is_scored[:, : self._num_unscored - 1] = False
        is_scored[:, -1] = False  # its next token is of no window
        step = max(1, _LOGITS // batch.numel() // 16) * 16
        divergence = Divergence(batch.numel(), batch.device)
        chosen = torch.zeros(batch.numel(), dtype=torch.float64, device=batch.device)
        begin = 0
        others = None if other is None else other.logits(batch, step)
        for piece in original.logits(batch, step):
            scored = piece if others is None else next(others)
            divergence.add(piece, scored)
            places = targets - begin
            is_here = (places >= 0) & (places < piece.shape[1])
            chosen[is_here] = scored[is_here, places[is_here]].double()
            begin += piece.shape[1]
        if others is not None:
            assert next(others, None) is None
        rows = is_scored.flatten()
        self._kl.append(divergence.kl()[rows].cpu())
        self._agrees.append(divergence.agrees()[rows].cpu())
        self._losses.append((divergence.log_totals()[1] - chosen)[rows].cpu())

    def quality(self) -> TextQuality:
        """All tokens together."""
        kl = torch.cat(self._kl)
        return TextQuality(
            perplexity=math.exp(min(float(torch.cat(self._losses).mean()), _LARGEST_LOSS)),
            kl_mean_nats=float(kl.mean()),
            kl_p99_nats=float(kl.kthvalue(math.ceil(0.99 * len(kl))).values),
            top1_ratio=float(torch.cat(self._agrees).double().mean()),
            num_tokens=len(kl),
        )


def cut(
    text_ids: Sequence[int], prefix_ids: Sequence[int], *, window_tokens: int, max_windows: int | None = None
) -> Windows:
    """Windows without overlap, each begun with the special tokens that go before a text, in batches of one length.

    A last one that is shorter is one if it has a token to score.

    Args:
        max_windows: the text behind so many is left out.

    Raises:
        ValueError: there is no token to score.
    """
    room = window_tokens - len(prefix_ids)
    num_unscored = max(1, len(prefix_ids))
    starts = range(0, len(text_ids), room) if room > 0 else range(0)
    windows = [[*prefix_ids, *text_ids[start : start + room]] for start in starts][:max_windows]
    windows = [window for window in windows if len(window) > num_unscored]
    if not windows:
        raise ValueError("no token to score")
    per_batch = max(1, BATCH_TOKENS // window_tokens)
    whole = [window for window in windows if len(window) == window_tokens]
    batches = [whole[i : i + per_batch] for i in range(0, len(whole), per_batch)]
    batches += [windows[-1:]] if len(windows[-1]) < window_tokens else []
    return Windows(tuple(torch.tensor(batch) for batch in batches), num_unscored)


def _ignore(_name: str, _states: Tensor) -> None:
    """No layer is looked at."""
