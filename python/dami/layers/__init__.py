"""The modules of a patched model."""
