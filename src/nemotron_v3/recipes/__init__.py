"""End-to-end programs built from the other subpackages: the demo."""
