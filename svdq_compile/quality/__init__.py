"""How much quantisation changes pictures: metrics, denoising runs, contact sheets. Importing this imports no torch."""
