"""A base model and fine-tuning tasks that need no download: it was really pre-trained, on generated text."""
