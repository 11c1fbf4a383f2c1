"""The commands. Every flag of every command is defined in this package."""
