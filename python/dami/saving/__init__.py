"""Saves a patched model as a directory."""
