"""Everything that has gradients, and patch tokens -> delta tokens. Reads caches, never videos."""
