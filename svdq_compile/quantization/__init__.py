"""Making checkpoints: ModelOpt's recipes and exporter on any device, and a data-free quantiser in torch.

Importing this package imports neither ModelOpt nor diffusers.
"""
