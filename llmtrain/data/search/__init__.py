"""Cuts a user's documents into passages, and finds those that a question asks for: by BM25, by embeddings, by both."""
