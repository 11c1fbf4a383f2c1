"""An OpenAI-compatible HTTP server on the engine, and its page."""
