"""Preprocessing: ops, and the pipes that are made of them."""
