"""Caches, which hold state alone, and the layers' steps over them."""
