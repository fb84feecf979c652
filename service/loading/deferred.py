"""Tensors that are made when they are used: a model of them runs its own forward with one weight in memory at a time.

transformers' loader gets them as a state dict and treats them like any tensors: what it does with them (stack, split,
transpose, give them other names) is written down and done later, whenever a module uses its parameter. So every rename
and merge that the loader knows holds here too, and nothing is read before the forward.

A linear multiplies its weight by blocks of rows, and an embedding takes the rows that it is asked for, where the
parameter is a tensor of the source as it lies there; all else uses whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

_BLOCK_WEIGHTS = 1 << 22
"""Weights of a linear in one block: 16 MiB in float32, some 0.03 s of one core."""
_BLOCKS_AT_ONCE = 2
"""More threads take smaller ones."""
_BLOCK_ROWS = 16
"""Blocks begin at multiples of so many rows: packed weights come in strips of them."""


class Source(Protocol):
    """Where a tensor comes from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read; floating point becomes float32."""

    def whole(self) -> Tensor:
        """All of it."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Entries `begin .. end - 1` along the first dimension; `begin` is a multiple of 16."""

    def pick(self, ids: Tensor) -> Tensor:
        """Some entries along the first dimension: int64[n]."""


class Crew(Protocol):
    """Who works on the blocks of one product."""

    @property
    def num_threads(self) -> int:
        """How many of them at once."""

    def run(self, work: Callable[[int], None], firsts: range) -> None:
        """Call `work` with each of `firsts`, in any order and on any threads; an error of one ends it."""


class Alone:
    """The calling thread, with the threads that torch has here."""

    num_threads = 1

    def run(self, work: Callable[[int], None], firsts: range) -> None:
        """See `Crew.run`."""
        for first in firsts:
            work(first)


@dataclass(slots=True)
class Workshop:
    """What the tensors of one model share.

    Attributes:
        device: where they are made.
        block_weights: of a linear in one block.
        is_open: False while a loader builds the model: nothing is made then, and operations are written down.
    """

    device: torch.device
    crew: Crew = field(default_factory=Alone)
    block_weights: int = _BLOCK_WEIGHTS
    is_open: bool = False


class Deferred(Tensor):
    """A tensor without storage, and how to make it. Its dtype is what it will have; it is the parameter of a module.

    Attributes:
        source: where it lies as it is, else None.
    """

    source: Source | None
    workshop: Workshop
    _make: Callable[[], Tensor]

    @classmethod
    def of(cls, source: Source, workshop: Workshop) -> Self:
        """A tensor that lies in a source."""
        dtype = torch.float32 if source.dtype.is_floating_point else source.dtype
        meta = torch.empty(source.shape, dtype=dtype, device="meta")
        return cls.made(meta, lambda: _widened(source.whole(), workshop), workshop, source=source)

    @classmethod
    def made(
        cls, meta: Tensor, make: Callable[[], Tensor], workshop: Workshop, *, source: Source | None = None
    ) -> Self:
        """A tensor like `meta` that `make` gives."""
        tensor: Self = Tensor._make_subclass(cls, meta)
        tensor.source, tensor.workshop, tensor._make = source, workshop, make
        return tensor

    def make(self) -> Tensor:
        """The tensor itself, anew with each call."""
        return self._make()

    def cut(self, begin: int, end: int) -> Deferred:
        """Entries `begin .. end - 1` along the first dimension of one that has a source."""
        assert self.source is not None
        return Deferred.of(_Cut(self.source, begin, end), self.workshop)

    def as_parameter(self) -> Self:
        """The same, for a module to hold as a parameter."""
        self._is_param = True
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        """Another tensor of the same origin."""
        return Deferred.made(_as_meta(self), self._make, self.workshop, source=self.source).as_parameter()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Write an operation down, or compute it with the tensors themselves."""
        kwargs = kwargs or {}
        first = next(value for value in _flat(args, kwargs) if isinstance(value, Deferred))
        if not first.workshop.is_open:
            return _write_down(func, args, kwargs, first)
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return first.workshop.device
        if func is functional.linear and _lies_in_a_source(args, 1):
            return _linear(*args, **kwargs)
        if func is functional.embedding and _lies_in_a_source(args, 1):
            return _embedding(*args, **kwargs)
        return func(*tree_map(_made, args), **tree_map(_made, kwargs))


_METADATA = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.ndim.__get__, Tensor.requires_grad.__get__),  # type: ignore[attr-defined]
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}
"""What needs no values."""
_UNCHANGED = {
    *(Tensor.to, Tensor.detach, Tensor.contiguous, Tensor.requires_grad_, Tensor.cpu, Tensor.float),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
"""What a loader does that leaves a tensor what it is; places and dtypes are those of the workshop."""


class _Cut:
    """Some entries of a source along its first dimension."""

    def __init__(self, source: Source, begin: int, end: int) -> None:
        self._source, self._begin, self._end = source, begin, end
        self.shape = (end - begin, *source.shape[1:])
        self.dtype = source.dtype

    def whole(self) -> Tensor:
        return self._source.rows(self._begin, self._end)

    def rows(self, begin: int, end: int) -> Tensor:
        return self._source.rows(self._begin + begin, self._begin + end)

    def pick(self, ids: Tensor) -> Tensor:
        return self._source.pick(ids + self._begin)


def read_stacks_once(model: nn.Module) -> None:
    """Have modules with stacked experts make their parameters once for each forward: they use one expert at a time."""
    for module in model.modules():
        if any(isinstance(p, Deferred) and p.dim() > 2 for p in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_take)
            module.register_forward_hook(_give_back, always_call=True)


def _take(module: nn.Module, _args: object) -> None:
    parameters: dict[str, Any] = module._parameters
    deferred: Any = {name: p for name, p in parameters.items() if isinstance(p, Deferred)}
    module._deferred = deferred
    for name, parameter in deferred.items():
        module._parameters[name] = nn.Parameter(parameter.make(), requires_grad=False)


def _give_back(module: nn.Module, _args: object, _output: object) -> None:
    deferred: Any = module._deferred
    module._parameters.update(deferred)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, (args, kwargs))
    return found


def _write_down(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], first: Deferred) -> Any:
    if func in _UNCHANGED or (func is Tensor.__getitem__ and args[1] is Ellipsis):
        return first
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)

    def again() -> Any:
        return func(*tree_map(_made, args), **tree_map(_made, kwargs))

    if isinstance(result, Tensor):
        return Deferred.made(_as_meta(result), again, first.workshop)
    if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
        parts = enumerate(map(_as_meta, result))
        return [Deferred.made(part, lambda i=i: again()[i], first.workshop) for i, part in parts]  # type: ignore[misc]
    return result


def _as_meta(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_like(tensor, device="meta")


def _made(value: Any) -> Any:
    return value.make() if isinstance(value, Deferred) else value


def _lies_in_a_source(args: tuple[Any, ...], place: int) -> bool:
    return len(args) > place and isinstance(args[place], Deferred) and args[place].source is not None


def _widened(tensor: Tensor, workshop: Workshop) -> Tensor:
    tensor = tensor.to(workshop.device)
    return tensor.float() if tensor.is_floating_point() else tensor


def _linear(x: Tensor, weight: Deferred, bias: Tensor | None = None) -> Tensor:
    """X @ weight.T + bias, by blocks of rows of the weight."""
    source, workshop = weight.source, weight.workshop
    assert source is not None
    num_rows, width = source.shape
    weights = workshop.block_weights * _BLOCKS_AT_ONCE // max(_BLOCKS_AT_ONCE, workshop.crew.num_threads)
    step = max(1, weights // width // _BLOCK_ROWS) * _BLOCK_ROWS
    rows = x.reshape(-1, width)
    products = rows.new_empty(len(rows), num_rows)

    @torch.no_grad()
    def multiply(first: int) -> None:
        last = min(first + step, num_rows)
        torch.mm(rows, _widened(source.rows(first, last), workshop).t(), out=products[:, first:last])
        if products.is_cuda:
            torch.cuda.current_stream().synchronize()  # so that what it took is known

    workshop.crew.run(multiply, range(0, num_rows, step))
    if bias is not None:
        products += _made(bias)
    return products.view(*x.shape[:-1], num_rows)


def _embedding(ids: Tensor, weight: Deferred, *_args: object, **_kwargs: object) -> Tensor:
    """Rows of an embedding; what else it is told concerns gradients."""
    assert weight.source is not None
    rows = _widened(weight.source.pick(ids.flatten()), weight.workshop)
    return rows.view(*ids.shape, -1)
