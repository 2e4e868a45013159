"""Fine-tuning of gates, of the backbone, and of the scales of packed weights."""
