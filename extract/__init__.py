"""Videos -> windows of pixels -> frozen backbone -> rows for a writer. Knows nothing of training."""
