"""How often each benchmark repeats: what `make bench` does, and what a result is held against. Imports nothing."""

DEFAULTS: dict[str, dict[str, int]] = {
    "step_time": {"rounds": 12},
    "techniques": {"rounds": 12},
    "router_balance": {"rounds": 24},
    "packed_generation": {"rounds": 9},
    "data_prepare": {"bytes": 40_000_000, "repeats": 5, "tokens": 100_000_000},
    "callback_step": {"rounds": 8},
    "distill_step": {"rounds": 6},
    "dpo_step": {"rounds": 8, "rows": 4},
    "checkpoint_stall": {"saves": 5, "steps_between": 4},
}
