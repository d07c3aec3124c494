# Written by docs/generate.py from the catalogue.
