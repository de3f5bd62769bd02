"""Solve and measure the differential equations of diffusion models."""
