"""The engine that decodes requests, and its drivers."""
