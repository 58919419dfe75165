"""What is shown of runs that have ended, and of the machine before a run starts."""
