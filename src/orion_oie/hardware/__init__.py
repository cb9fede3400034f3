"""The hardware of this machine: cores, devices, memory, now and over time.

For other packages: machine and cpu (cores, instructions, devices), probe (memory now), monitor
(samples of memory over time), sample (one sample), pressure (levels of memory pressure). cgroup
(limits of a container) and advice (recommendations under pressure) belong to these.
"""
