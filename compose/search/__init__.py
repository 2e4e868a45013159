"""A target instead of a recipe: proposes chains, measures them by halves, and keeps the best."""
