"""Kernels of one instruction set for the length of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.kernels import dispatch


@contextmanager
def computing_with(isa: str) -> Iterator[None]:
    """Select these kernels, then `auto`, without the check of products, which takes longer than most tests."""
    dispatch.select_isa(isa, is_right=lambda _: True)
    try:
        yield
    finally:
        dispatch.select_isa("auto", is_right=lambda _: True)
