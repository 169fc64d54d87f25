"""Checkpoints of Hugging Face."""
