"""Whole volumes on one grid, files that are complete or absent, workers that end with their parent."""
