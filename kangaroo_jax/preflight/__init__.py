"""Whether a run would fit a machine that is not there, and how fast it would be: the real programs, compiled for it
from shapes alone."""
