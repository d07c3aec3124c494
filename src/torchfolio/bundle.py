"""A network on disk: safe weights beside a description of how to build the module."""
