"""Videos -> windows of pixels -> frozen backbone -> rows of a shard. Knows nothing of training."""
