"""Triton device code; the only folder that imports triton."""
