"""The algorithms once more, in float64 numpy loops: slow, short, and written without looking at the library."""
