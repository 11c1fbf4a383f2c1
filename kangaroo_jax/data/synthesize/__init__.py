"""Data that the target writes itself."""
