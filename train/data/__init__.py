"""Text to tokens to samples: building corpora, mixing them, and the fixed order in which they are read."""
