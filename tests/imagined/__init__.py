"""`torch.compile(backend="bla")` for CUDA on a machine without a GPU, and its results.

The tensors are said to be on an imagined GPU (device.py), so Dynamo, the rewrite, AOTAutograd, its
partitioner and Inductor do what they do for one (session.py). What Inductor writes runs in Triton's
interpreter on tensors of the CPU (interpreter.py). A backward is given what its forward kept, as it
lies. programs.py has what is compiled; `python -m tests.imagined [NAME…]` runs it. `python -m
tests.imagined.models [PART…]` compiles whole models and counts kernels and bytes beside Inductor's.

Other than on a GPU: no bf16, no libdevice but what is written here, no random numbers.
"""
