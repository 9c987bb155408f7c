"""Where models and arrays already live: transformers, compressed-tensors, GGUF, Zarr. Nothing here is imported before it is
asked for, or before the other package is."""
