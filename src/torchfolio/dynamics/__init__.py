"""Differential equations and diffusion."""
