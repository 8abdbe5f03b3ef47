"""Passes over graphs, a file each; ``pipeline`` holds their order."""
