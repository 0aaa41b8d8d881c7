"""Processes, meshes and engines: the only place that imports deepspeed or FSDP."""
