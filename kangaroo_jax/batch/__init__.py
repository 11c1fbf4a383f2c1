"""Files of prompts: read, decoded in slots, and answered in a file that a killed run goes on from."""
