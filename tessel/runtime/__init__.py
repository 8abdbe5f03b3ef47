"""Run time: what the generated host program calls."""
