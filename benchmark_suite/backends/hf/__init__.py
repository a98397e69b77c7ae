"""Hugging Face's transformers, without NeMo: text is learned by decoders, heads by encoders."""
