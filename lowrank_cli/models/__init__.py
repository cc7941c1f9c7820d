"""Pretrained models: finding, loading, quantising and packing them."""
