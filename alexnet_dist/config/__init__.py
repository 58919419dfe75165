"""The settings of a run: their schema, and how they are loaded and checked."""
