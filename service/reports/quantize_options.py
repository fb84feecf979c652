"""Where `pennyweight quantize` writes, and how that is written on its command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from service.errors import SettingError, shown


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flag that is no setting."""
    parser.add_argument("--output", metavar="DIR", help="folder to write, which must not be there yet")


def parse_output(text: str | None) -> Path:
    """A folder that is not there, or empty, and can be made.

    Raises:
        SettingError: none was named, or it cannot be one.
    """
    if not text:
        raise SettingError("--output: not given; name a folder for the quantized model")
    try:
        path = Path(text).expanduser().absolute()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise SettingError(f"--output {shown(text)}: is there already; name a folder that is not")
        parent = next(folder for folder in path.parents if folder.exists())
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"--output {shown(text)}: {reason}; name another folder") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SettingError(f"--output {shown(text)}: cannot be written; name another folder")
    return path
