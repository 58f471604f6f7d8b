"""The operations of a CPU, compiled by numba: rows and pages are read where they lie and widened in registers.

numba is optional and imported in this package only. It caches compiled kernels beside these files, or in the user's
cache folder where these cannot be written.
"""
