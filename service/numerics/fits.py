"""Fits: scales, and offsets, that leave less error than the range of a group does.

Groups are columns here, [weights, groups], so that every operation runs along groups, and what a group gets depends on
no other one.

`mse` tries eleven finer and coarser steps: each gives codes, to which least squares refit scale and offset; the
best is kept, round to nearest included. With t = x k + z, l = round(t) and r = l - t, a weight is x = (l - r - z) / k,
and its error with scale (1 + a) / k and offset (b - z) / k is (a l + b + r) / k, so that all sums are of the size of
the error, and float32 does for them. Integer zero points z stay, and (a (l - z) + r) / k is the error.

`hqq` keeps the scale of the range and moves the offset, for a smaller sum of |error|^0.7: up to twenty times codes are
rounded, the error e is shrunk to sign(e) max(|e| - |e|^-0.3 / beta, 0) with beta = 10 * 1.01^i, which only outliers
survive, and the zero point becomes the mean that fits what is left. It ends for a group whose mean error does not fall.

Sources: `make_qkx2_quants` and `make_qx_quants` of llama.cpp; HQQ, mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from service.numerics.affine import (
    QuantizedWeight,
    bounds_of,
    by_group,
    centre,
    code_bounds,
    code_dtype,
    dequantize,
    quantize,
    refuse_nonfinite,
    stored_offsets,
    to_codes,
)
from service.numerics.schemes import QuantScheme

STEPS: Final = tuple(i / 5 - 1 for i in range(11))
"""Added to the number of steps that a range is cut into, one candidate each; twice as many gain 0.01 dB."""

_FIT_WEIGHTS: Final = 96 * 1024  # fitted at a time: four matrices of them stay in the caches of a core
_COLUMN_BLOCK: Final = 64  # sums of columns are the same in any matrix of whole blocks
_HQQ_ROUNDS: Final = 20
_HQQ_BETA: Final = 10.0
_HQQ_GROWTH: Final = 1.01


class Line(NamedTuple):
    """What maps codes back, and the squared error that is left: float32[..., groups] each."""

    error: Tensor
    scales: Tensor
    offsets: Tensor

    def best(self) -> Line:
        """Of candidates [candidates, groups] the first with the least error for each group; NaN is no error."""
        chosen = self.error.nan_to_num(float("inf")).argmin(0, keepdim=True)
        return Line(*(values.gather(0, chosen)[0] for values in self))


class Search:
    """Codes and least squares for some groups, and several candidates [candidates, groups] of steps and zero points.

    Args:
        x: float32[weights, groups].
        codes: smallest and largest.
        importance: of each squared error, float32[weights, groups]; None for 1.
    """

    def __init__(self, x: Tensor, codes: tuple[int, int], importance: Tensor | None = None) -> None:
        self._x, self._codes, self._importance = x, codes, importance
        self.codes, self.residuals, self._product, self._weighted = (torch.empty_like(x) for _ in range(4))
        self._total = x.new_tensor(len(x)) if importance is None else importance.sum(0)

    def round(self, inverses: Tensor, zeros: Tensor) -> None:
        """Find `codes` for steps of 1 / `inverses` and these, maybe broken, zero points, and their `residuals`."""
        torch.mul(self._x, inverses, out=self.residuals).add_(zeros)
        torch.round(self.residuals, out=self.codes).clamp_(*self._codes)
        torch.sub(self.codes, self.residuals, out=self.residuals)

    def fit_scale(self, inverses: Tensor, zeros: Tensor) -> Line:
        """Refit the scale for integer zero points, which are the offsets of the result."""
        sums = inverses.new_empty(3, *inverses.shape)
        for index, (inverse, zero) in enumerate(zip(inverses, zeros, strict=True)):
            self.round(inverse, zero)
            distances = self.codes.sub_(zero)
            self._sum(distances, distances, sums[0, index])
            self._sum(distances, self.residuals, sums[1, index])
            self._sum(self.residuals, self.residuals, sums[2, index])
        qq, rq, rr = sums
        a = -rq / qq.masked_fill(qq == 0, 1)
        return Line((rr + a * rq) / inverses**2, (1 + a) / inverses, zeros)

    def fit_line(self, inverses: Tensor, zeros: Tensor, *, is_offset_positive: bool = True) -> Line:
        """Refit scale and offset.

        Args:
            is_offset_positive: whether one may be; else it becomes 0, with the best scale for that.
        """
        c, cc, rc, r, rr = self._sums_of_lines(inverses, zeros)
        determinant = self._total * cc - c * c
        determinant.masked_fill_(determinant <= 0, float("inf"))  # then a and b are 0
        a, b = (c * r - self._total * rc) / determinant, (c * rc - cc * r) / determinant
        error = a * rc + b * r + rr
        if not is_offset_positive:
            is_above = b > zeros
            a = torch.where(is_above, -(zeros * c + rc) / cc.masked_fill(cc == 0, 1), a)
            b = torch.where(is_above, zeros, b)
            error = a * (a * cc + 2 * (b * c + rc)) + b * (b * self._total + 2 * r) + rr
        return Line(error / inverses**2, (1 + a) / inverses, (b - zeros) / inverses)

    def _sums_of_lines(self, inverses: Tensor, zeros: Tensor) -> Tensor:
        """Float32[5, candidates, groups]: of codes, their squares, times residuals, residuals, their squares."""
        sums = inverses.new_empty(5, *inverses.shape)
        for index, (inverse, zero) in enumerate(zip(inverses, zeros, strict=True)):
            self.round(inverse, zero)
            weighted = self._weigh(self.codes)
            torch.sum(weighted, 0, out=sums[0, index])
            self._sum(weighted, self.codes, sums[1, index])
            self._sum(weighted, self.residuals, sums[2, index])
            weighted = self._weigh(self.residuals)
            torch.sum(weighted, 0, out=sums[3, index])
            self._sum(weighted, self.residuals, sums[4, index])
        return sums

    def _weigh(self, values: Tensor) -> Tensor:
        return values if self._importance is None else torch.mul(values, self._importance, out=self._weighted)

    def _sum(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        torch.sum(torch.mul(left, right, out=self._product), 0, out=out)


def fit(weight: Tensor, scheme: QuantScheme, *, scale_dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Round float32[out, in] with a fit other than `rtn`.

    Args:
        scale_dtype: as in `affine.quantize`.

    Raises:
        QuantizationError: the weight holds NaN or infinity.
    """
    dtype = scale_dtype or (torch.bfloat16 if scheme.group_size else torch.float32)
    parts = [_fit_groups(grouped, scheme, dtype) for _, grouped in by_group(weight, scheme.group_size)]
    codes, scales = torch.cat([part.codes for part in parts], 1), torch.cat([part.scales for part in parts], 1)
    points = [part.zero_points for part in parts if part.zero_points is not None]
    refuse_nonfinite(scales)
    return QuantizedWeight(codes, scales, torch.cat(points, 1) if points else None)


def in_columns(grouped: Tensor, fit_columns: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """Call with the groups of [out, groups, weights] as columns, some at a time; each result [out, groups]."""
    num_weights = grouped.shape[2]
    columns = grouped.reshape(-1, num_weights)
    size = max(1, _FIT_WEIGHTS // num_weights // _COLUMN_BLOCK) * _COLUMN_BLOCK
    results = [[part[: len(some)] for part in fit_columns(_padded(some))] for some in torch.split(columns, size)]
    return [torch.cat(parts).view(grouped.shape[:2]) for parts in zip(*results, strict=True)]


def _padded(groups: Tensor) -> Tensor:
    """Float32[groups, weights] as [weights, groups], with zeros up to a whole block of columns."""
    padding = -len(groups) % _COLUMN_BLOCK
    return functional.pad(groups.t(), (0, padding)).contiguous()


def _fit_groups(grouped: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round [out, groups, weights]; what `mse` finds is taken where it is better than round to nearest."""
    if scheme.fit == "hqq":
        return _hqq(grouped, scheme, dtype)
    weight = grouped.flatten(1)
    nearest = quantize(weight, scheme, scale_dtype=dtype)
    scales, offsets = in_columns(grouped, lambda x: _least_squares(x, scheme))
    fitted = _stored(grouped, scales, offsets, scheme, dtype)

    def errors(rounded: QuantizedWeight) -> Tensor:
        return dequantize(*rounded, scheme).sub_(weight).square_().view(grouped.shape).sum(2)

    return _choose(errors(fitted) < errors(nearest), fitted, nearest)


def _choose(takes_first: Tensor, first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """Of each group [out, groups] one of two roundings."""

    def chosen(left: Tensor, right: Tensor) -> Tensor:
        shape = (*takes_first.shape, -1)
        return torch.where(takes_first[..., None], left.view(shape), right.view(shape)).flatten(1)

    zero_points = None
    if first.zero_points is not None and second.zero_points is not None:
        zero_points = chosen(first.zero_points, second.zero_points)
    return QuantizedWeight(chosen(first.codes, second.codes), chosen(first.scales, second.scales), zero_points)


def _least_squares(x: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scales and offsets, or scales and zero points, of columns."""
    first, last = code_bounds(scheme)
    search = Search(x, (first, last))
    low, high = x.amin(0), x.amax(0)
    inverses = _candidates(low, high, scheme)
    if scheme.offset == "float":
        line = search.fit_line(inverses, first - low * inverses)
    elif scheme.offset == "asym":
        line = search.fit_scale(inverses, (first - (low.clamp(max=0) * inverses).round()).clamp_(first, last))
    else:
        line = search.fit_scale(inverses, torch.full_like(inverses, centre(scheme)))
    return line.best()[1:]


def _candidates(low: Tensor, high: Tensor, scheme: QuantScheme) -> Tensor:
    """Inverse scales [candidates, groups], that of round to nearest first."""
    first, last = code_bounds(scheme)
    if scheme.offset == "sym":
        num_steps = -centre(scheme) if scheme.bits < 8 else 127
        spans = torch.where(high >= -low, high, low) if scheme.bits < 8 else torch.maximum(high, -low)
    else:
        num_steps = last - first
        spans = high - low if scheme.offset == "float" else high.clamp(min=0) - low.clamp(max=0)
    steps = low.new_tensor(sorted(STEPS, key=abs))[:, None]
    return (num_steps + (steps if num_steps > 0 else -steps)) / spans.masked_fill(spans == 0, 1)


def _stored(
    grouped: Tensor, scales: Tensor, offsets: Tensor, scheme: QuantScheme, dtype: torch.dtype
) -> QuantizedWeight:
    """Round scales and offsets to their dtype and find the codes for them."""
    stored = scales.to(dtype)
    stored = stored.masked_fill(stored.abs() < torch.finfo(dtype).tiny, 1)[..., None]
    if scheme.offset == "float":
        kept = stored_offsets(offsets, dtype)[..., None]
        codes = to_codes((grouped - kept).div_(stored).round_(), scheme)
        return QuantizedWeight(codes, torch.cat((stored, kept), 2).flatten(1), None)
    codes = to_codes(grouped.div(stored).round_().add_(offsets[..., None]), scheme)
    points = offsets.to(torch.int16).to(code_dtype(scheme)) if scheme.offset == "asym" else None
    return QuantizedWeight(codes, stored.flatten(1), points)


def _hqq(grouped: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedWeight:
    first, last = code_bounds(scheme)
    low, high = bounds_of(grouped)
    scales = (high / (last - first) - low / (last - first)).to(dtype)
    scales.masked_fill_(scales < torch.finfo(dtype).tiny, 1)
    zeros = first - low / scales
    packed = torch.cat((grouped, scales, zeros), 2)  # so that each column brings its own
    (moved,) = in_columns(packed, lambda x: (_move_zeros(x[:-2], x[-2], x[-1], (first, last)),))
    return _stored(grouped, scales[..., 0], -moved * scales[..., 0], scheme, dtype)


def _move_zeros(x: Tensor, scales: Tensor, zeros: Tensor, codes: tuple[int, int]) -> Tensor:
    """Zero points of columns."""
    scales = scales.masked_fill(scales == 0, 1)  # of columns that only pad
    search, beta = Search(x, codes), _HQQ_BETA
    inverses, smallest = scales.reciprocal(), torch.full_like(scales, float("inf"))
    is_moving = torch.ones_like(scales, dtype=torch.bool)
    for _ in range(_HQQ_ROUNDS):
        search.round(inverses, zeros)
        errors = (search.residuals * scales).abs_()
        mean_error = errors.mean(0)
        moves = search.residuals.mean(0)
        if float(errors.amax()) ** 1.3 > 1 / beta:  # else all of them shrink to 0
            shrunk = torch.copysign((errors - errors.pow(-0.3) / beta).clamp_(min=0), search.residuals)
            moves -= shrunk.mean(0) * inverses
        zeros = torch.where(is_moving, zeros + moves, zeros)
        is_moving &= mean_error < smallest
        smallest = torch.minimum(smallest, mean_error)
        beta *= _HQQ_GROWTH
        if not is_moving.any():
            break
    return zeros
