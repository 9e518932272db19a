"""Benchmarks of the operator against dense peers, checked before they are timed. Importing this imports no torch."""
