"""A rig, not a product: Triton gets a backend named ``cpu``, so that vLLM's Model Runner V2 runs where there is no GPU.

With this directory's parent on ``PYTHONPATH``, ``TRITON_INTERPRET=1`` and ``VLLM_USE_V2_MODEL_RUNNER=1``, vLLM's own runner, states
and kernels run, the kernels interpreted in numpy. No file of vLLM or Triton is changed.

What it cannot show: kernels of GPUs, and every race, since kernels run one after the other and streams do nothing. CUDA graphs:
`tests.rig.graphs_on_cpu`.
"""
