"""What was found out about a quantized model beside the full-precision one. Plain values, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

NUM_TOKENS: Final = 256
"""Of a probe, at least; several windows where the context is shorter."""

FidelityState = Literal["off", "running", "done", "failed", "stopped", "unavailable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """One decoder layer: how far the hidden states behind it are from those of the full-precision model.

    Attributes:
        name: full module name.
        relative_error: ||h - h'|| / ||h||, Frobenius, over all tokens of the probe.
    """

    name: str
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """The state of the comparison, and its results once it is `done`.

    Attributes:
        reason: why it is `failed`, `stopped` or `unavailable`, else "".
        kl_mean_nats: KL(original || quantized) of the next token, mean over the tokens of the probe.
        top1_ratio: share of these where both find the same token likeliest.
        num_tokens: of the probe.
        seconds: wall seconds of the comparison.
        layers: in the order of the model; none where there was nothing to compare.
    """

    state: FidelityState
    reason: str = ""
    kl_mean_nats: float | None = None
    top1_ratio: float | None = None
    num_tokens: int = 0
    seconds: float = 0.0
    layers: tuple[LayerFidelity, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Fidelity:
        """Undo `to_dict`."""
        layers = tuple(LayerFidelity(**layer) for layer in fields["layers"])
        return cls(**fields | {"layers": layers})


OFF = Fidelity(state="off")
RUNNING = Fidelity(state="running")
STOPPED = Fidelity(state="stopped", reason="the service ended")
UNQUANTIZED = Fidelity(state="done", kl_mean_nats=0.0, top1_ratio=1.0)
"""Of recipe `none`, by definition: nothing is compared."""
