"""Cells to text and back."""
