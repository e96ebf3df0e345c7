"""Expert parallelism: which rank holds which experts, and the dispatchers that send tokens to them."""
