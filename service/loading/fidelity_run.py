"""When a service compares its model with the original: before it is ready, or beside its requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import closing

import torch

from service.errors import FidelityError, ModelNotFound, PennyweightError
from service.loading import memory
from service.loading.background import HurriedCrew, ModestCrew, Stopped, be_modest
from service.loading.config import first_line
from service.loading.deferred import Crew, Workshop
from service.loading.fidelity import Comparison, windows_of
from service.loading.fidelity_report import OFF, RUNNING, STOPPED, UNQUANTIZED, Fidelity
from service.loading.loader import LoadedModel
from service.loading.progress import LoadProgress, Phase

logger = logging.getLogger(__name__)

_END_S = 10.0  # how long `stop` waits for the block that is under way


class FidelityCheck:
    """The comparison of a loaded model, made once at most. Of recipe `none` there is nothing to compare.

    Args:
        token_ids: of the probe.
    """

    def __init__(self, loaded: LoadedModel, token_ids: list[int]) -> None:
        self._loaded = loaded
        self._token_ids = token_ids
        self._crew: ModestCrew | None = None
        self._thread = threading.Thread(target=self._run, name="fidelity", daemon=True)
        self._result = UNQUANTIZED if loaded.report.recipe == "none" else OFF

    def result(self) -> Fidelity:
        """How far it has come."""
        return self._result

    def run_first(self, progress: LoadProgress, *, num_threads: int, max_kl: float | None) -> None:
        """Compare while the caller waits.

        Args:
            progress: counts the bytes that are read.
            max_kl: nats.

        Raises:
            FidelityError: the KL is more than `max_kl`, or is not known.
        """
        if self._result is OFF:
            try:
                crew = HurriedCrew(self._num_threads(num_threads))
                with memory.tight_heap(), closing(crew):
                    self._result = self._compare(crew, progress)
            except Exception as error:  # classes of models fail in any way
                raise FidelityError(
                    f"{self._loaded.name} could not be compared with its original: {_reason(error)}; use --fidelity "
                    "background or off, without --max-kl"
                ) from error
            self._log()
        kl = self._result.kl_mean_nats
        assert kl is not None
        if max_kl is not None and not kl <= max_kl:
            raise FidelityError(
                f"{self._loaded.report.recipe} moves the next token's distribution by {kl:.6g} nats (mean KL over "
                f"{self._result.num_tokens} tokens), --max-kl allows {max_kl:g}; use a recipe with more bits, or raise "
                "the limit"
            )

    def run_beside(self, is_busy: Callable[[], bool], num_threads: int) -> None:
        """Compare on threads of its own, whatever becomes of it; unless it was done.

        Args:
            is_busy: whether requests are being computed.
            num_threads: that it may use while none are.
        """
        if self._result is OFF:
            self._crew = ModestCrew(self._num_threads(num_threads), is_busy)
            self._result = RUNNING
            self._thread.start()

    def stop(self) -> None:
        """End it if it still runs, within one block; `join` waits for that."""
        if self._crew is not None:
            self._crew.stop()

    def join(self) -> None:
        """Wait for the end of what was stopped."""
        if self._thread.is_alive():
            self._thread.join(_END_S)

    @property
    def _device(self) -> torch.device:
        model = self._loaded.model
        return next(tensor.device for tensor in (*model.parameters(), *model.buffers()))

    def _num_threads(self, num_threads: int) -> int:
        return num_threads if self._device.type == "cpu" else 1

    def _run(self) -> None:
        assert self._crew is not None
        be_modest()
        try:
            self._result = self._compare(self._crew, LoadProgress())
        except Stopped:
            self._result = STOPPED
        except ModelNotFound as error:
            self._result = Fidelity(state="unavailable", reason=_reason(error))
        except Exception as error:
            self._result = Fidelity(state="failed", reason=_reason(error))
            logger.warning("%s could not be compared with its original: %s", self._loaded.name, _reason(error))
            logger.debug("the comparison failed", exc_info=True)
        else:
            self._log()
        finally:
            self._crew.close()
            memory.trim_heap()

    def _compare(self, crew: Crew, progress: LoadProgress) -> Fidelity:
        comparison = Comparison(self._loaded, Workshop(self._device, crew), progress)
        progress.enter(Phase.WARMUP, comparison.num_bytes)
        return comparison.run(windows_of(self._token_ids, self._loaded.served))

    def _log(self) -> None:
        result = self._result
        logger.info(
            "fidelity: KL %.6g nats, the same likeliest token for %.4g %% of %d tokens, in %.3g s",
            result.kl_mean_nats,
            100 * (result.top1_ratio or 0),
            result.num_tokens,
            result.seconds,
        )


def _reason(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, PennyweightError) else f"{type(error).__name__}: {text}"
