"""What `pennyweight inspect --plot` keeps of weights while they are encoded: counts, never weights."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from service.layers.replace import Slot
from service.numerics.encode import EncodedWeight, decode, decode_codes
from service.numerics.schemes import QuantScheme
from service.reports.histograms import Histogram

SHOWN_ROWS: Final = 64
SHOWN_COLUMNS: Final = 256
_NUM_CODES: Final = 256


class LayerCounts:
    """One layer, as far as it has been seen.

    Attributes:
        weights, decoded, errors: of w, of w', and of w' - w.
        code_counts: int64[256], of each code from `first_code` on.
        codes: the first rows and columns of its codes, int16[up to 64, up to 256].
    """

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self.weights, self.decoded, self.errors = Histogram(), Histogram(), Histogram()
        self.code_counts = np.zeros(_NUM_CODES, dtype=np.int64)
        self.first_code = 0
        self.codes = np.zeros((0, 0), dtype=np.int16)

    def add(self, weight: Tensor, encoded: EncodedWeight) -> None:
        """Take some rows of the weight, float[rows, in], and what they became."""
        rows, columns = weight.shape
        decoded = decode(
            encoded.qweight,
            encoded.scales,
            encoded.zero_points,
            scheme=self.scheme,
            out_features=rows,
            in_features=columns,
        )
        self.weights.add(weight)
        self.decoded.add(decoded)
        self.errors.add(decoded.sub_(weight))
        codes = decode_codes(encoded.qweight, scheme=self.scheme, out_features=rows, in_features=columns)
        self.first_code = -_NUM_CODES // 2 if codes.dtype == torch.int8 else 0
        if not self.codes.size:
            self.codes = codes[:SHOWN_ROWS, :SHOWN_COLUMNS].short().numpy()
        for chunk in torch.split(codes, max(1, (1 << 20) // columns)):
            places = chunk.flatten().short() - self.first_code
            self.code_counts += torch.bincount(places.int(), minlength=_NUM_CODES).numpy()


class EncodingWatch:
    """Sees every weight as it is encoded, in pieces: see `LoadOptions.watch`.

    Attributes:
        layers: by module name, in the order in which they came.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerCounts] = {}

    def __call__(self, slot: Slot, weight: Tensor, encoded: EncodedWeight) -> None:
        """Take a piece of the weight of a layer."""
        if slot.name not in self.layers:
            self.layers[slot.name] = LayerCounts(slot.scheme)
        self.layers[slot.name].add(weight, encoded)

    def together(self) -> tuple[Histogram, Histogram, Histogram]:
        """Weights, decoded weights and errors of all layers."""
        sums = Histogram(), Histogram(), Histogram()
        for layer in self.layers.values():
            for total, part in zip(sums, (layer.weights, layer.decoded, layer.errors), strict=True):
                total.merge(part)
        return sums
