"""Runs in vLLM's worker process: the guarded model, the trackers that tell it which row belongs to which plan, artifacts.

One road: ``tracker_*`` puts a request's plan into the `SlotTable` before the forward pass; ``forward`` lets every row carry its
slot and position through the model's output; ``compute_logits`` reads them back and applies the guards. Whatever vLLM does with
logits afterwards (sampling, beam search, log-probabilities of outputs and prompts, grammars) sees guarded values only.

``engine_guards`` makes the guards of the catalogue; ``contrast`` (on ``fork``) and ``steering`` (on ``steer_hooks``, in CUDA graphs
``steer_graphs`` and ``graphs_v2``) reach into the network at ``sites``; ``artifacts`` keeps what is loaded.
"""
