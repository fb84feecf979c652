"""Chooses the fastest way of computing a model that is right."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

from service.engine.attention import set_attention, stock_attention
from service.engine.filters import length_dependent_rope, model_type, packing_obstacle
from service.engine.probe import Probe
from service.engine.runner import ModelRunner, Runner
from service.engine.sequential import CacheRunner
from service.engine.stats import EnginePath
from service.errors import UnsupportedModel
from service.layers.fusion import num_fused_groups, unfuse

logger = logging.getLogger(__name__)


def choose_runner(model: nn.Module, *, vocab_size: int, max_model_len: int) -> ModelRunner:
    """Try the ways of computing a model, the fastest first, and take the one that passes the probe.

    Raises:
        UnsupportedModel: none does, or the model's own forward fails.
    """
    started = time.monotonic()
    make_probe = partial(Probe, model.eval(), vocab_size=vocab_size, max_model_len=max_model_len)
    attention = stock_attention(model)
    obstacle = packing_obstacle(model)
    if obstacle is None:
        runner, reason = _try(model, partial(Runner, model), make_probe(thorough=False))
        if runner is not None:
            logger.info("the model is computed packed: %s; probed in %.2f s", reason, time.monotonic() - started)
            return runner
        set_attention(model, attention)
    rejected = [f"packed: {obstacle or reason}"]
    probe = make_probe(thorough=True)
    for name, make in _slow_ways(model):
        runner, reason = _try(model, make, probe)
        if runner is not None:
            logger.warning(
                "model type %r is computed %s, with a forward for each sequence, which is slow for many (%s); "
                "probed in %.2f s",
                model_type(model),
                name,
                "; ".join(rejected),
                time.monotonic() - started,
            )
            return runner
        rejected.append(f"{name}: {reason}")
    raise UnsupportedModel(
        f"model type {model_type(model)!r} is computed wrongly in every way ({'; '.join(rejected)}); use another model"
    )


def _slow_ways(model: nn.Module) -> Iterator[tuple[str, Callable[[], ModelRunner]]]:
    """Names and constructors, the fastest first."""
    make = partial(CacheRunner, model)
    if not length_dependent_rope(model):  # keys of different chunks would have different frequencies
        yield "per-request", partial(make, path=EnginePath.PER_REQUEST, chunked=True)
    yield "per-request with whole prompts", partial(make, path=EnginePath.PER_REQUEST, chunked=False)
    yield "single", partial(make, path=EnginePath.SINGLE, chunked=False)


def _try(model: nn.Module, make: Callable[[], ModelRunner], probe: Probe) -> tuple[ModelRunner | None, str]:
    """The runner if it passes, with fused linears or else without, and what the probe found."""
    runner, reason = _try_as_it_is(make, probe)
    if runner is None and unfuse(model):
        reason_fused = reason
        runner, reason = _try_as_it_is(make, probe)
        if runner is not None:
            logger.warning("linears that share an input are computed one by one (together: %s)", reason_fused)
    elif runner is not None and (num_groups := num_fused_groups(model)):
        logger.info("%d groups of linears that share an input are computed together", num_groups)
    return runner, reason


def _try_as_it_is(make: Callable[[], ModelRunner], probe: Probe) -> tuple[ModelRunner | None, str]:
    try:
        runner = make()
        error = probe.error(runner)
    except Exception as failure:  # noqa: BLE001 - a model raises anything on a way that does not suit it
        return None, f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    return runner if error <= 1 else None, f"its logits are off by {error:.2g} times the tolerance"
