"""Linear task heads on frozen features: training, labels, crops."""
