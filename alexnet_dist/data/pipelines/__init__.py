"""Pipelines that decode images and cut patches: torchvision, DALI, or from memory."""
