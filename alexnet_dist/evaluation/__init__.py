"""Scores, and a trained network that answers."""
