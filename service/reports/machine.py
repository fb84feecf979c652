"""How many CPU threads are worth starting on this machine, and why."""

from __future__ import annotations

import math
from typing import NamedTuple

import psutil

from service.loading.control_group import ControlGroups


class ThreadLimits(NamedTuple):
    """What bounds the number of threads.

    Attributes:
        affinity: logical CPUs that this process may run on.
        physical_cores: of the whole machine; two threads of one core share its arithmetic units.
        quota: CPU seconds in a second that the control group allows; None without a limit.
    """

    affinity: int
    physical_cores: int
    quota: float | None

    @property
    def num_threads(self) -> int:
        """The least of all; a part of a CPU counts as one."""
        return min(self._by_name().values())

    @property
    def limited_by(self) -> str:
        """Name of what is least; of equal ones the first."""
        counts = self._by_name()
        return min(counts, key=counts.__getitem__)

    def _by_name(self) -> dict[str, int]:
        counts = {"physical_cores": self.physical_cores, "affinity": self.affinity}
        return counts if self.quota is None else counts | {"quota": max(1, math.ceil(self.quota))}


def thread_limits() -> ThreadLimits:
    """The limits of this process now."""
    affinity = len(psutil.Process().cpu_affinity() or [0])
    return ThreadLimits(
        affinity=affinity,
        physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or affinity,
        quota=ControlGroups().cpu_quota(),
    )
