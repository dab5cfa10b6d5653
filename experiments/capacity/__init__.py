"""Capacity: the highest rate of requests at which every objective is met and the queue is stable."""
