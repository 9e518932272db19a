"""Reading and writing ModelOpt checkpoints: headers, manifest, tensors. Knows nothing of models or kernels."""
