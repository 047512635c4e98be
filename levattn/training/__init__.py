"""Training runs: config, optimiser, sharded state, the step, checkpoints, metrics, and the loop around them."""
