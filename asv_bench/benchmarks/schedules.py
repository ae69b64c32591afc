"""Layer of schedules: plain floats, computed once a process."""

from orthlin import schedules

MADE = {
    "newton_schulz": lambda: schedules.newton_schulz(5),
    "muon": schedules.muon,
    "speedrun": schedules.speedrun,
    "polar_express": schedules.polar_express,
    "cans": lambda: schedules.cans(1e-3, 6),
    "for_tolerance": lambda: schedules.for_tolerance(1e-3, 0.1),
}


class Time:
    version = "1"
    params = list(MADE)
    param_names = ["schedule"]
    rounds = 1
    repeat = (3, 20, 1.0)

    def time_made(self, name: str) -> None:
        MADE[name]()
