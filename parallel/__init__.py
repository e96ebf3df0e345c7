"""Where it is computed: the device mesh and the parallel layouts."""
