"""Serving a pair to many requests at once, each at its own λ: one file per engine, and the server of `dami serve`."""
