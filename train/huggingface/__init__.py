"""The Hugging Face layouts of the model: what serving engines and transformers read, streamed in both directions."""
