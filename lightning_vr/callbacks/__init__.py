"""Callbacks that make the noise of diffusion training visible."""
