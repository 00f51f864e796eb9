"""Architecture level: unlearning inside the network, on embeddings, hidden states and projections. Pure tensors in, tensors out."""
