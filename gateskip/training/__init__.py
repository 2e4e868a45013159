"""Fine-tuning of gates, of the backbone, and of the scales of packed weights."""

from __future__ import annotations

from gateskip.extras import need

need("training", "accelerate")
