"""λ while tokens are generated."""
