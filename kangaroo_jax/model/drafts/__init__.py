"""Draft models: what drafts, behind one protocol; one module per kind."""
