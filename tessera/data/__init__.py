"""Images with captions, and the order in which training sees them."""
