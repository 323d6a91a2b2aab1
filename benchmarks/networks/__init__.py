"""Whole training steps and inference of networks, with `torch.nn` and converted by `kn.convert`."""
