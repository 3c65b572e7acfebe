"""Data sources, and the batches drawn from them."""
