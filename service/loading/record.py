"""What is known about a load while it runs: which weights become what, and what has been done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from service.errors import PennyweightError
from service.layers.replace import QuantizedLayer, Slot
from service.loading.tensors import TensorRef
from service.numerics.encode import EncodedWeight

Watch = Callable[[Slot, Tensor, EncodedWeight], None]
"""Sees rows of a weight, float[rows, in], or one expert, and what they were encoded as; both only during the call."""

BUFFERS = ("qweight", "scales", "zero_points")


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """Error of one quantized weight: sums of squares of the weight and of its error."""

    signal: float
    noise: float


@dataclass(frozen=True, slots=True)
class UnreadExperts:
    """The matrices of all experts of a layer, unread: of each those whose rows come one below the other."""

    experts: tuple[tuple[TensorRef, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        rows, columns = sum(ref.shape[0] for ref in self.experts[0]), self.experts[0][0].shape[1]
        return len(self.experts), rows, columns


@dataclass(slots=True)
class LoadRecord:
    """What the hooks saw during one load.

    Attributes:
        slots: every weight that the recipe decides about.
        layers: the quantized layers to fill, by name.
        names: the same names by that of the weight they stand for.
        shared: other names of such layers, and their own ones.
        unread: where the weights of layers lie that are still to be read, by the name of the layer.
        encoded: errors of the layers filled so far.
        original_bytes, num_parameters: of the unquantized model at the serving dtype, tied tensors once.
        quantize_s, pack_s: wall seconds.
        watch: sees each piece of a weight once it is encoded.
        failure: the first error in a conversion; transformers itself reports only its text.
    """

    slots: list[Slot] = field(default_factory=list)
    layers: dict[str, tuple[Slot, QuantizedLayer]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    unread: dict[str, TensorRef | UnreadExperts] = field(default_factory=dict)
    encoded: dict[str, EncodedLayer] = field(default_factory=dict)
    original_bytes: int = 0
    num_parameters: int = 0
    quantize_s: float = 0.0
    pack_s: float = 0.0
    watch: Watch | None = None
    failure: PennyweightError | None = None

    @property
    def buffer_names(self) -> set[str]:
        """Full names of the buffers of the quantized layers; a symmetric one has fewer."""
        return {f"{name}.{leaf}" for name in (*self.layers, *self.shared) for leaf in BUFFERS}
