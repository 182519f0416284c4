"""Forecasts made from caches and scored."""
