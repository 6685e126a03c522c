"""How many rollouts a question gets, and at which n they are reported; one option of the group `budget` a module."""
