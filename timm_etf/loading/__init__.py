"""Batches for a loop: which images, in which order, on which process, and how they reach its device."""
