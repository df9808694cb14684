"""A pipeline's images against a reference set."""
