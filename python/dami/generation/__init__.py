"""Generates tokens at a given λ."""
