"""The five console commands."""
