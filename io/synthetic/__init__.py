"""Data made by a recipe instead of downloaded."""
