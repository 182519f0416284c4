"""From a step to its batch: order, residency, batches."""
