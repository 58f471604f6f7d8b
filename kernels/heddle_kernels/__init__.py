"""Batched operations over segments of tokens: rows of many adapters, vectors, attention over pages.

Imports nothing of heddle. `dispatch.select_kernels` returns the implementation for a device.
"""
