"""Packed weights: grids, packed layers, folders of them, draft copies."""
