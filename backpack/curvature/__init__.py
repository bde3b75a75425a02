"""Second order: columns of the loss Hessian, and what is pulled back of them."""
