"""A base model and fine-tuning tasks that need no download: generated text, really pre-trained on, on any machine."""
