"""A patched model becomes a directory."""
