"""Configuration keys: nested and dotted, how values are spelt, which key was meant."""
