"""Comparisons with the libraries whose files Inlay reads and writes."""
