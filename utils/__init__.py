"""Plotting and interpolation helpers shared by the five scripts."""
