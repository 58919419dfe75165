"""The loop, and what a run writes while it goes."""
