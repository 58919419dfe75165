"""Checkpoints: written, verified, chosen, and started from."""
