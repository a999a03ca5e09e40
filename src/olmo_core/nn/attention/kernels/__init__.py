"""The kernels, a room for each op. No room imports another, nor anything above this package."""
