"""The engine: sequences, scheduler, KV blocks, attention, runner, sampler and the thread that runs them.

This package imports nothing by itself, so that the torch-free modules (`sequence`, `stats`) can be
imported before torch is.
"""
