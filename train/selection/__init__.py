"""Best of many: the sample that comes nearest, found without a gradient."""
