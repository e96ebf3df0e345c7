"""Health of a training: spikes and what follows them, dead experts, gradients near Adam's ε, growing activations."""
