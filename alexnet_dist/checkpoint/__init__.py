"""What a run keeps, and how it begins from it."""
