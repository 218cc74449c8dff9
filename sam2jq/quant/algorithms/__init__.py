"""The algorithms of quantization, one file each: a config, the mathematics for one kernel, and a Transform."""
