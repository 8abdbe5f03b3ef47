"""Passes over graphs, a file each; ``pipeline`` holds their order. A file that begins with ``_`` serves several."""
