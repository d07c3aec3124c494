"""Layers that replace a standard one."""
