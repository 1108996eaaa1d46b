"""Runnable recipes: from real data to a checked ONNX file and a table, e.g. ``python -m qat.recipes.resnet``."""
