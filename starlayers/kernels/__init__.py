"""Fused implementations, private; imported by the first call that needs them."""
