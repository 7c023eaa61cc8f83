"""Benchmarks: how exact and how fast, printed as tables."""
