"""The operators that the model is made of, each with its own backward where that saves time or memory."""
