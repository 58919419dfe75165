"""What can be said of runs that are over, and of the machine before one."""
