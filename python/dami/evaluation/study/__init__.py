"""The pilot study: what happens between the two ends of a pair, and which parts of the model cause it.

Representation continuity: similarity of every layer's states at neighbouring λ, and to those of both ends. Structural
connectivity: loss and accuracy along the path from the instruct end to the thinking end and a little beyond both, and
along a control path to another model. Ablations: λ = 1 in only one part of the model, or in all but one.
"""

from __future__ import annotations

from dami.evaluation.study.answers import Trial, answer
from dami.evaluation.study.controls import PERMUTED, control_pair
from dami.evaluation.study.reading import TeacherForced, read_texts
from dami.evaluation.study.results import Ablation, PathResult, Study, read_study
from dami.evaluation.study.run import PATH, study
from dami.evaluation.study.settings import ModuleCell, Setting, model_parts, module_cells, row_intensities

__all__ = [
    "PATH",
    "PERMUTED",
    "Ablation",
    "ModuleCell",
    "PathResult",
    "Setting",
    "Study",
    "TeacherForced",
    "Trial",
    "answer",
    "control_pair",
    "model_parts",
    "module_cells",
    "read_study",
    "read_texts",
    "row_intensities",
    "study",
]
