"""A training step and a prediction, on each of the layouts."""
