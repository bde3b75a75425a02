"""Models that the laws are checked on: layers, networks, random compositions, and models that others wrote."""
