"""What `pennyweight inspect` is to draw, and how that is written on its command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from service.errors import SettingError, shown


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that are no settings."""
    parser.add_argument(
        "--plot", metavar="DIR", help="draw errors, histograms and codes into this folder; takes matplotlib"
    )


def parse_folder(text: str) -> Path:
    """A folder to write pictures into; it is made if only its last part is missing.

    Raises:
        SettingError: it is a file, or cannot be made or written.
    """
    try:
        path = Path(text).expanduser()
        path.mkdir(exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise SettingError(f"--plot {shown(text)}: cannot be written; name another folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(
            f"--plot {shown(text)}: {reason}; it must be a folder, or one that can be made where its parent is"
        ) from error
    return path
