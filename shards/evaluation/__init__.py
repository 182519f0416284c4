"""The protocol of evaluation in NumPy: crops, label rules, targets."""
