"""``levi-fast bench kernels --device cuda``."""
