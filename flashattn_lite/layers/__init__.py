"""Layers around attention, under the names that flash_attn gives them."""
