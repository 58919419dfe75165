"""Ranks: who they are, how they meet, what they send each other, how they stop together."""
