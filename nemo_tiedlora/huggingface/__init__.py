"""Models as Hugging Face's transformers save them, taken over as bases. Nothing in their folders is run."""
