"""Forecasters and other models of time series."""
