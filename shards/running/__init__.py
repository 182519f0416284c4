"""What one process runs on, for how long, and which part of the work is its own."""
