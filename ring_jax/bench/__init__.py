"""Measuring scripts for GPUs."""
