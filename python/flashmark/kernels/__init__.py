"""Triton kernels, one subpackage an operator. Nothing here is imported until a GPU backend runs.

The sources of the subpackages lie in `kernels/` beside `python/`; `setup.py` maps them here.
"""
