"""Training and evaluating: one cell, or a matrix of them."""
