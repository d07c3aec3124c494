"""Spiking neural networks and the rules that train them."""
