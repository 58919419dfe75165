"""Engines: how a training step and a prediction are computed on each layout."""
