"""Adapters: reading and checking what people upload, the canonical form, the store, pages and residency.

Imports heddle_kernels only. Everything but `device_rows` is free of torch.
"""
