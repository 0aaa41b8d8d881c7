"""Selective language modelling."""
