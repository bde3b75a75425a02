"""Extended modules: hooks of their forward pass, what these leave in the graph, and their parameters."""
