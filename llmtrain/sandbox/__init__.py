"""Runs Python functions on text that a model wrote, in processes that can do nothing but compute.

`pool.Pool` is the whole interface. docs/sandbox.md has the table of what is forbidden and by which mechanism.
"""
