"""Helpers around the quantities: examples' data, Kronecker factors, parameter vectors, sub-sampling."""
