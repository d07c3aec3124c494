"""Backdoor attacks, detectors and defences."""
