"""Linen models: what a call shows, and the model with packed layers."""
