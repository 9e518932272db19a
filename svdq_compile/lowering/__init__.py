"""Which kernel computes a linear, and why."""
