"""Loads checkpoints, adapters and packed pairs as patched models."""
