"""A text that a command is given as a file."""

from __future__ import annotations

from pathlib import Path

from service.errors import SettingError, shown


def read_text(name: str, *, max_characters: int) -> str:
    """As many characters from the beginning of a file.

    Raises:
        SettingError: it cannot be read, is no UTF-8, or holds blanks only.
    """
    try:
        with Path(name).expanduser().open(encoding="utf-8") as file:
            text = file.read(max_characters)
    except UnicodeDecodeError as error:
        raise SettingError(f"--text {shown(name)}: must be UTF-8, and is not; convert it") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"--text {shown(name)}: cannot be read ({reason}); give a file that can be") from error
    if not text.strip():
        raise SettingError(f"--text {shown(name)}: is empty; give a text of some pages")
    return text
