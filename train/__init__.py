"""How it is trained: data, optimizer, bias control, loop, checkpoints, metrics, report."""
