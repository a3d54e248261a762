"""Measurements of Monte Carlo noise: targets and gradients."""
