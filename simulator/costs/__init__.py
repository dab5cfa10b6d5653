"""What a step costs: from a data sheet (`roofline`), from measurements (`fitted`), or by definition (`constant`)."""

from simulator.costs.base import CostModel, StepCost
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.costs.fitted import FittedCost
from simulator.costs.roofline import RooflineCost

__all__ = ["ConstantCost", "CostModel", "FittedCost", "LinearCost", "RooflineCost", "StepCost"]
