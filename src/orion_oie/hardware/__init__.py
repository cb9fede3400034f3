"""What this machine is and has, now and over time.

machine, cpu: cores, instructions, devices. probe, cgroup: how much memory there is, and who limits
it. monitor: samples of memory over time; sample, pressure, advice are what it keeps, concludes and
says.
"""
