"""Kernels and networks measured on a GPU."""
