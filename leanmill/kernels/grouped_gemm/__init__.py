"""Rows sorted by expert times stacked expert weights, forward and backward."""
