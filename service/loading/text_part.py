"""The text part of a checkpoint that has parts for several kinds of input."""

from __future__ import annotations

from typing import Final, TypeVar

from service.errors import UnsupportedModel
from service.loading.tensors import TensorHeader

_Tensor = TypeVar("_Tensor", bound=TensorHeader)

_PREFIXES: Final = {
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.": "",
    "text_model.": "",
    "lm_head.": "lm_head.",
}
"""How models with parts name the weights of their text part, and what it calls them by itself."""
_PLAIN_PREFIXES: Final = ("model.", "lm_head.")
"""Of those whose other parts stand beside the text part and leave it its own names."""


def keep_text_part(refs: dict[str, _Tensor], name: str) -> None:
    """Of a checkpoint with parts for several kinds of input, keep the text part, under the names that it has alone.

    What else there is, such as an image encoder, is not read; what lacks in the text part will be missed by name.

    Raises:
        UnsupportedModel: no weight is named like one of a text part.
    """
    text: dict[str, _Tensor] = {}
    for full_name, ref in refs.items():
        for prefix, own_prefix in _PREFIXES.items():
            if full_name.startswith(prefix):
                text[own_prefix + full_name.removeprefix(prefix)] = ref
                break
    if not text.keys() - {"lm_head.weight"}:
        text = {full_name: ref for full_name, ref in refs.items() if full_name.startswith(_PLAIN_PREFIXES)}
    if not text.keys() - {"lm_head.weight"}:
        raise UnsupportedModel(
            f"{name} takes more than text, and its text part is none that this version finds: no weight begins with "
            f"{' or '.join([*_PREFIXES, 'model.'])}; give a text model"
        )
    refs.clear()
    refs.update(text)
