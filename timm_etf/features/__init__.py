"""Features of any model on any data, computed once: what every measuring verb stands on."""
