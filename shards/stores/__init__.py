"""Caches and videos at an address: object stores, and the Hugging Face hub."""
