"""Processes and machines: devices, clusters, stop requests, pools of workers."""
