"""Google's services: TPU slices, Vertex AI jobs, the package, and what refusals mean."""
