"""StarNets for other engines: `portable` graphs, and files by `export`."""
