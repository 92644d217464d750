"""Levels of the tasks of ../train_pair/tasks.py, as reasoning-gym is told them; not the shipped pair's."""

CONFIGS = {
    "chain_sum": lambda level: {"min_terms": level + 1, "max_terms": level + 1, "min_digits": 1, "max_digits": 2},
    "leg_counting": lambda level: {"min_animals": level, "max_animals": level, "max_instances": 9},
    "gcd": lambda level: {"max_value": (25, 40, 60, 80, 99)[level - 1]},
    "calendar_arithmetic": lambda level: {
        "tasks": ["weekday_offset"],
        "offset_upper_bound": (7, 20, 60, 200, 600)[level - 1],
    },
}
