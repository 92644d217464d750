"""Two models become one with a dial."""
