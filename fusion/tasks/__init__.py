"""Tasks, which define targets, losses, scores and answers; one file each."""

from fusion.tasks.base import Task
from fusion.tasks.classification import Classification
from fusion.tasks.multi_label import MultiLabel
from fusion.tasks.multi_task import MultiTask, SubTask
from fusion.tasks.ordinal import Ordinal
from fusion.tasks.regression import Regression
from fusion.tasks.retrieval import Retrieval

__all__ = ["Classification", "MultiLabel", "MultiTask", "Ordinal", "Regression", "Retrieval", "SubTask", "Task"]
