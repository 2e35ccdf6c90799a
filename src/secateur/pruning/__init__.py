"""Scores, methods, budgets, masks, and the one loop over blocks."""
