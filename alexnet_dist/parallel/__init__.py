"""Ranks: how they start, find each other, communicate, and stop together."""
