"""Studies of starified pretrained models."""
