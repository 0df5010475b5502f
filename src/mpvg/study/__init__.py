"""Several runs and what they show together."""
