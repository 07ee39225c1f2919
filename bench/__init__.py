"""Speed and peak memory against PyTorch's own attention: `python -m bench`."""
