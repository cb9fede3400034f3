"""The hardware of this machine and its memory, now and over time.

machine, cpu: cores, instructions, devices. probe, cgroup: memory and the limits on it. monitor:
samples of memory over time; sample, pressure and advice are its data, its level and its
recommendations.
"""
