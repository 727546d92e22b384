"""What stands above the work: who may do what."""
