"""Nyström attention in plain PyTorch, on every device."""
