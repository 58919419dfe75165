"""What a run would need and how long it would take, before it is started."""
