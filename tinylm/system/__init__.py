"""The machine as the project sees it: device, processes, memory, cores, and which code runs."""
