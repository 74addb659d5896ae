"""Studies of star layers: what was measured, and the pages that report it."""
