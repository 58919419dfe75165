"""Every setting of a run: its type and bounds, where its value comes from, what may go together."""
