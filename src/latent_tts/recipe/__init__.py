"""Training recipes, one a family."""
