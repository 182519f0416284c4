"""Labelled data sets as evaluation caches."""
