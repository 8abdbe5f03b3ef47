"""Which tile every kernel should have on a named GPU, and why."""
