"""Tuned tiles: what a kernel is, what is known of it on a device, and where that is kept."""
