"""A layout traced without its ranks: a fake process group, fake tensors, and a record of what they would allocate."""
