"""How far a quantized model is from the full-precision one: a second pass over the shards, after the load.

Both models are the stock one of transformers, run once in float32 over the same token ids: one with the weights of the
checkpoint, read while they are multiplied, one with those that the quantized model holds, decoded while they are. So
the result is what the weights lost, whatever the serving dtype and kernels; what these add is the matter of the parity
probe and of the kernels' check. The quantized model is read, never run: it may serve meanwhile.

In memory at a time: blocks of one linear (or the experts of one layer, or a convolution), the hidden states behind
every layer, and logits of a piece of the vocabulary. What a model does to its logits must not mix tokens of the
vocabulary: scales, caps and biases do not.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from service.errors import FidelityError
from service.loading.config import ServedModel
from service.loading.deferred import Deferred, Workshop
from service.loading.fidelity_report import NUM_TOKENS, Fidelity, LayerFidelity
from service.loading.loader import LoadedModel, settle_vocabulary
from service.loading.originals import as_held, read_originals
from service.loading.planning import open_checkpoint
from service.loading.progress import LoadProgress
from service.numerics.divergence import Divergence

_LOGITS = 1 << 20
"""Of one piece of the vocabulary, all tokens together."""


class Comparison:
    """A full-precision model and a quantized one, ready to be compared.

    Making it takes the interpreter for as long as transformers takes to build the model without weights; `run` takes
    processor time.

    Args:
        progress: counts the bytes that are read.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel: the checkpoint is not what it was when it was loaded.
    """

    def __init__(self, loaded: LoadedModel, workshop: Workshop, progress: LoadProgress) -> None:
        served = loaded.served
        self._checkpoint = open_checkpoint(loaded.source, served, progress)
        try:
            settle_vocabulary(served, self._checkpoint.refs)
            self._original = Side(read_originals(served, self._checkpoint.refs, workshop))
            self._held = Side(as_held(self._original.model, loaded.model, workshop))
        except BaseException:
            self._checkpoint.close()
            raise
        self._device = workshop.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return self._checkpoint.num_bytes

    def run(self, windows: Tensor) -> Fidelity:
        """Compare; once, then the files are closed.

        Args:
            windows: token ids int64[windows, tokens], each read by itself.

        Raises:
            CheckpointError: a file ends early or cannot be read.
            FidelityError: logits are not finite.
        """
        started = time.monotonic()
        windows = windows.to(self._device)
        try:
            with torch.no_grad():
                errors = _layer_errors(self._original, self._held, windows)
                divergence = self._divergence(windows)
        finally:
            self._checkpoint.close()
        kl = float(divergence.kl().mean())
        if not math.isfinite(kl):
            raise FidelityError(f"the mean KL is {kl}: one of the two models has logits that are no numbers")
        return Fidelity(
            state="done",
            kl_mean_nats=kl,
            top1_ratio=float(divergence.agrees().double().mean()),
            num_tokens=windows.numel(),
            seconds=time.monotonic() - started,
            layers=tuple(LayerFidelity(name=name, relative_error=error) for name, error in errors.items()),
        )

    def _divergence(self, windows: Tensor) -> Divergence:
        divergence = Divergence(windows.numel(), self._device)
        step = max(1, _LOGITS // windows.numel() // 16) * 16
        pieces = (self._original.logits(windows, step), self._held.logits(windows, step))
        for original, held in zip(*pieces, strict=True):
            divergence.add(original, held)
        return divergence


class Side:
    """One of the two models: its decoder layers, what its body has given, and its logits by pieces.

    Attributes:
        given: what the body has given in the last `read`; the head continues from there.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = _decoder_layers(model)
        self._body = model.base_model
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        weight = getattr(head, "weight", None)
        is_linear = type(head) is nn.Linear and isinstance(weight, Deferred) and weight.source is not None
        self._head = head if is_linear and self._body is not model else None
        self.given: Any = None

    def read(self, windows: Tensor, see: Callable[[str, Tensor], None]) -> None:
        """Run all but the head; `see` gets the name of each layer and the hidden states behind it."""

        def watcher(name: str) -> Callable[..., None]:
            def watch(_layer: nn.Module, _args: object, output: Any) -> None:
                see(name, output[0] if isinstance(output, (tuple, list)) else output)

            return watch

        def keep(_body: nn.Module, _args: object, output: Any) -> None:
            self.given = output

        hooks = [layer.register_forward_hook(watcher(name)) for name, layer in self.layers.items()]
        hooks.append(self._body.register_forward_hook(keep))
        try:
            next(self._pieces(windows, 1))
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, windows: Tensor, step: int) -> Iterator[Tensor]:
        """Logits float32[tokens, at most `step`] of one piece of the vocabulary after another; needs `read`."""
        if self._head is None:
            yield from self._pieces(windows, step)
            return
        given = self.given
        self._body.forward = lambda *_args, **_kwargs: given
        try:
            yield from self._pieces(windows, step)
        finally:
            del self._body.forward

    def _pieces(self, windows: Tensor, step: int) -> Iterator[Tensor]:
        if self._head is None:
            yield from torch.split(_forward(self.model, windows), step, dim=-1)
            return
        whole = dict(self._head._parameters)
        for begin in range(0, len(whole["weight"]), step):
            for leaf, parameter in whole.items():
                if parameter is not None:
                    self._head._parameters[leaf] = parameter.cut(begin, min(begin + step, len(parameter)))
            try:
                yield _forward(self.model, windows)
            finally:
                self._head._parameters.update(whole)


def _layer_errors(original: Side, held: Side, windows: Tensor) -> dict[str, float]:
    """By layer, in order; of one that is called several times the last."""
    hidden: list[Tensor] = []
    original.read(windows, lambda _name, states: hidden.append(states.clone()))
    hidden.reverse()
    errors: dict[str, float] = {}

    def compare(name: str, states: Tensor) -> None:
        expected = hidden.pop()
        errors[name] = float((states - expected).double().norm() / expected.double().norm().clamp(min=1e-30))

    held.read(windows, compare)
    return errors


def _forward(model: nn.Module, windows: Tensor) -> Tensor:
    """Logits float32[tokens, vocabulary], or those of the pieces that the head has now."""
    known = inspect.signature(model.forward).parameters
    arguments = {"attention_mask": torch.ones_like(windows), "use_cache": False}
    output = model(input_ids=windows, **{name: arguments[name] for name in arguments if name in known})
    logits: Tensor = output.logits
    return logits.flatten(0, 1)


def _decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The longest list of modules that lies least deep, which is where every family has its layers."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return {}
    path, layers = max(lists, key=lambda item: (-item[0].count("."), len(item[1])))
    return {f"{path}.{i}": layer for i, layer in enumerate(layers)}


def windows_of(token_ids: list[int], served: ServedModel) -> Tensor:
    """Cut the ids of a probe into windows that the model has positions for: int64[windows, tokens].

    Args:
        token_ids: repeated if they are fewer than `NUM_TOKENS`.
    """
    width = min(NUM_TOKENS, served.context_length)
    num_windows = -(-NUM_TOKENS // width)
    repeats = -(-num_windows * width // len(token_ids))
    return torch.tensor((token_ids * repeats)[: num_windows * width]).view(num_windows, width)
