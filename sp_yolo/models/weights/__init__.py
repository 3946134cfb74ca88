"""Any weights file -> tensors, without running what it holds -> a model."""
