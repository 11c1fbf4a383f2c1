"""The commands: every flag is defined here, and everything is printed here."""
