"""The one CLIP."""
