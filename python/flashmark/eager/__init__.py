"""Tiled PyTorch implementations: linear memory, explicit backward, any device and dtype."""
