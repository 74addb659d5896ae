"""Kernels compiled ahead of time, and the least time that each can take."""
