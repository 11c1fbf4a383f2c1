"""The commands: every flag is defined here. A command parses its flags, calls the library and prints."""
