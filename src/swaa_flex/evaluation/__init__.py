"""Evaluation: what a recipe costs a model, measured on tasks."""
