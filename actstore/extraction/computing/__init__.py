"""Computing runs the model over segments and writes them, wherever the worker is."""
