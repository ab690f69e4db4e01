"""The losses: one folder each."""
