"""Checkpoints, adapters and packed pairs become patched models."""
