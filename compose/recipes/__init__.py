"""`gateskip compress`: a recipe for one model, the run of it, and the card of what came out."""
