"""The one CLIP (Radford et al. 2021): it trains, scores, and is the perceptual net; open_clip's names and numbers."""
