"""The steps that an attack takes over every pixel or logit, each in one pass.

A file holds one kernel's specification in plain torch, whose order of operations defines its bits; ``fused/`` holds
the same step in Triton, under the same name. ``dispatch.py`` chooses. Each is also an operator
``torch.ops.vlmdefend.*``, so that torch.compile and fake tensors can pass it.
"""
