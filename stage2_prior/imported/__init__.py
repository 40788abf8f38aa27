"""Priors of other projects: each is a `DecoderSpec`, embeddings and a head over our trunk (`decoder.py`)."""
