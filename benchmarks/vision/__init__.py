"""Studies of vision networks."""
