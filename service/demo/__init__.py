"""The model that is served when none is named, and the recipe that made it."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """Directory of the embedded model, in the form that `save_pretrained` writes."""
    return Path(__file__).parent / "model"
