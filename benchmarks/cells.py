"""The exact cells that several scripts measure on: problems, processes."""

import sdeflow as sf

PROCESSES = {"VP": sf.VP, "EDM": sf.EDM, "RectifiedFlow": sf.RectifiedFlow}
PROBLEMS = {
    "gaussian": sf.problems.gaussian,
    "ring": sf.problems.ring,
    "mixture64": sf.problems.mixture64,
    "digits": sf.problems.digits,
}
