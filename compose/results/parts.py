"""Every part of a cell's result, by one name: where readers import records from.

Every field is optional where it may not have been measured. Fields that a record does not name are
kept, so that a measurement may say more than this version knows.
"""

from __future__ import annotations

from compose.results.curves import SkippingCurve, SkippingFigures, SkippingPoint
from compose.results.history import Outcome, Peer, SeedRun, StepInfo, TrainingPoint, Verdict
from compose.results.insight import BranchUse, GroupUse, Insight
from compose.results.performance import (
    Arithmetic,
    Compute,
    Measured,
    PhaseCompute,
    Size,
    Speed,
    SpeedNumbers,
    TextCompute,
)
from compose.results.quality import (
    Contamination,
    NoiseFloor,
    OwnAnswers,
    Perplexity,
    Quality,
    TaskScore,
)
from compose.results.record import Estimate, Record
from compose.results.speculation import Divergence, LosslessCheck, Speculation

__all__ = [
    "Arithmetic",
    "BranchUse",
    "Compute",
    "Contamination",
    "Divergence",
    "Estimate",
    "GroupUse",
    "Insight",
    "LosslessCheck",
    "Measured",
    "NoiseFloor",
    "Outcome",
    "OwnAnswers",
    "Peer",
    "Perplexity",
    "PhaseCompute",
    "Quality",
    "Record",
    "SeedRun",
    "Size",
    "SkippingCurve",
    "SkippingFigures",
    "SkippingPoint",
    "Speculation",
    "Speed",
    "SpeedNumbers",
    "StepInfo",
    "TaskScore",
    "TextCompute",
    "TrainingPoint",
    "Verdict",
]
