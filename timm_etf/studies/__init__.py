"""One file for each measuring verb beside transfer."""
