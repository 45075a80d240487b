"""Best paths through a trellis of shifted bits."""
