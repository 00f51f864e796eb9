"""All that the API server's process and the engine's share: plans on the wire, artifact files, the vocabulary."""
