"""Hugging Face folders by transformers' continuous batching."""
