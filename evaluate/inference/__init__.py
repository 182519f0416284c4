"""From pixels to possible futures: the Python API."""
