"""Serves a pair to many requests at once, each at its own λ: one file or package per engine, and `dami serve`."""
