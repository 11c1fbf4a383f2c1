"""Attention over a cache of keys and values: one module per layout of the cache in memory."""
