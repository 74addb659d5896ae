"""Private: fused implementations, imported on first use by the modules that need them."""
