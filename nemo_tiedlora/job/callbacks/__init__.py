"""What goes along with training, as Lightning callbacks."""
