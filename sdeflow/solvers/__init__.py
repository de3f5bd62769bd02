"""Solvers: native ones and the two foreign backends."""
