"""Second derivatives of single nodes of a recorded graph: what the Gauss-Newton matrix leaves out of the Hessian."""
