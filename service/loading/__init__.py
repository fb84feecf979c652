"""Loading: from a model name to a quantized model in memory, and the report of what that did.

This package imports nothing by itself, so that `report` and `progress` can be imported before torch is.
"""
