from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.rendering import write_json

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(values, st.integers(0, 1100))
def test_every_value_is_written_as_the_standard_library_does_however_long_its_lists(value: object, length: int) -> None:
    for wrapped in (value, {"a": [value] * length, "b": [[value]]}):
        assert write_json(wrapped) == json.dumps(wrapped, separators=(",", ":"))


def test_numbers_that_json_lacks_are_refused() -> None:
    for value in (float("nan"), [float("inf")] * 1000):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(value)
