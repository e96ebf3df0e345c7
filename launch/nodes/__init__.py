"""A run on several nodes: where they meet, the store that they share, who is first, and what each of them does."""
