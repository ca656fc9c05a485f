"""The method itself, in the order of the paper: start, E-step, M-step, loop, joint phase, losses."""
