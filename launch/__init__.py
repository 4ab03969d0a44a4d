"""Getting a job onto accelerators: what can be checked of it without having one."""
