"""Benchmarks: check against the float64 reference first, then time in pairs. Behind `repkern bench`."""
