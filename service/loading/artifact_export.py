"""A quantized model in a folder of its own, which holds all that serving needs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from service.errors import ModelError, UnsupportedModel
from service.loading.artifact import MANIFEST_NAME, Manifest
from service.loading.artifact_write import sync_folder, write_artifact
from service.loading.loader import LoadedModel
from service.loading.shards import INDEX_NAME, PICKLE_INDEX_NAME
from service.loading.source import SMALL_FILES

_REPLACED = {"config.json", INDEX_NAME, PICKLE_INDEX_NAME, MANIFEST_NAME}


def export_artifact(
    loaded: LoadedModel,
    output: Path,
    *,
    save_tokenizer: Callable[[Path], object],
    on_bytes: Callable[[int], None],
) -> Manifest:
    """Write the artifact, its config inside, the tokenizer and copies of other small files; all or nothing.

    Args:
        save_tokenizer: writes it into a folder, in the place of its files in the model's folder.
        on_bytes: called with the bytes of each piece written.

    Raises:
        UnsupportedModel: the model brings its own code.
        ModelError: a file cannot be written.
    """
    if not loaded.served.model_class.__module__.startswith("transformers."):
        raise UnsupportedModel(f"{loaded.name} brings its own code, which no artifact holds; serve the model itself")
    config = json.loads((loaded.folder / "config.json").read_text(encoding="utf-8"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True
        ) as beside:
            written = Path(beside) / "artifact"
            written.mkdir()
            for path in _small_files(loaded.folder):
                shutil.copyfile(path, written / path.name)
            save_tokenizer(written)
            source = {"model": loaded.name, "revision": loaded.revision}
            manifest = write_artifact(written, loaded.contents, facts=source, config=config, on_bytes=on_bytes)
            written.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise ModelError(f"--output {output}: {error.strerror}; name a folder that can be written") from error
    return manifest


def _small_files(folder: Path) -> list[Path]:
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name not in _REPLACED)
