import harness  # noqa: F401  (declares torchvision's operators before anything here imports it)
