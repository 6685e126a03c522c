"""Sets of questions and their rules for answers; one option of the group `task` a module."""
