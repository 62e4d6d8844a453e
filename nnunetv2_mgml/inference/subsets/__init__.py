"""Predict every subset of every case from one pass of the encoders; knows no score."""
