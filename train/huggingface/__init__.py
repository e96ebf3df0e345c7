"""The Hugging Face layouts of the model: what serving engines and transformers read, written and read in a stream."""
