"""The weights of other systems' ViTs, read and written.

containers.py and torch_file.py give a file's tensors by name and shape, read one at a time;
mapping.py turns a table of rules (their tensor, ours) both ways; npz.py, timm.py and huggingface.py
hold each system's table and know what its files say of the network; pretrained.py detects and
reads, writing.py writes.
"""
