"""Texts and what is to be written of them, summaries or translations: files, tokens, training, scores."""
