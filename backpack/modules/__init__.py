"""Extended modules: the hooks of their forward pass, the notes that these leave in the graph, and their parameters."""
