"""Studies of the coefficients of star layers."""
