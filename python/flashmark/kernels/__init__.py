"""Triton kernels, one subpackage an operator. They need Triton; nothing here is imported until a GPU backend runs.

The sources of the subpackages lie in the folder `kernels/` beside `python/`; `setup.py` maps them here.
"""
