"""The callback for PyTorch Lightning, and models from its checkpoints."""
