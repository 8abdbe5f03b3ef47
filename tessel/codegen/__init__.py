"""From tile programs to source text."""
