"""Runs of several phases: training and passes one after another, in one run folder."""
