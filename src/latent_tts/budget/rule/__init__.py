"""When `budget=adaptive` has enough rollouts of a question; one option of the group `budget/rule` per module."""
