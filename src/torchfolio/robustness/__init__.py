"""Adversarial attacks, bounds and the verifiers that use them."""
