"""Helpers that tests, benchmarks and users of this package share."""
