"""Interfaces of older code, kept alive over the one model."""
