"""Triton code, the only folder that imports triton; linted by Triton's rules of naming."""
