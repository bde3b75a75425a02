"""Random models, losses, extensions and subsets, each compared with plain autograd."""
