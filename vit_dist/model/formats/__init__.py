"""The weights of other systems' ViTs, read and written.

tensors.py, containers.py and torch_file.py give a file's tensors by name and shape, read one at a
time. mapping.py turns a table of rules (the other system's tensor, ours) both ways.
vision_transformer.py, timm.py and huggingface.py hold each system's table and know what its files
tell of the network. architectures.py and foreign.py tell other networks from ours, by name and by
tensors. pretrained.py detects and reads, writing.py writes.
"""
