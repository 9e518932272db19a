"""One CUDA graph for a transformer's whole forward, per input shape."""
